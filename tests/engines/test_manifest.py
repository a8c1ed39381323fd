"""The manifest vouches for its files, and is written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.files import write_atomically
from engines.manifest import MANIFEST, BundleError, File, Manifest
from tests import ROOT


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def test_what_was_saved_is_what_is_loaded(copied: Path, manifest: Manifest) -> None:
    (copied / MANIFEST).unlink()
    manifest.save(copied)
    assert Manifest.load(copied) == manifest


def test_every_file_is_vouched_for(copied: Path, manifest: Manifest) -> None:
    for file in manifest.files:
        path = copied / file.path
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(BundleError, match=path.name):
            Manifest.load(copied)
        path.unlink()
        with pytest.raises(BundleError, match=f"{path.name} is missing"):
            Manifest.load(copied)
        path.write_bytes(content)
    assert Manifest.load(copied) == manifest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda facts: facts["graphs"].pop("decode"), "graph decode is missing"),
        (lambda facts: facts["graphs"]["decode"]["outputs"].pop(), "whether pictures are sound.* Build it again"),
        (lambda facts: facts["graphs"]["decode"]["onnx"].pop("fp32"), "graph in fp32"),
        (lambda facts: facts["builds"]["onnxruntime"]["engines"].pop("decode"), "engine of decode is missing"),
        (lambda facts: facts.update(rows=[4, 2]), "do not ascend"),
        (lambda facts: facts["preview"][0].pop(), "not for 4 channels and a constant"),
        (lambda facts: facts["preview"].pop(), "preview: .* at least 3 items"),
        (lambda facts: facts["noise_schedule"].update(trained_betas=[0.1, 0.2]), "2 trained_betas for 1000"),
    ],
)
def test_facts_that_cannot_be_are_refused(copied: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    facts = json.loads((copied / MANIFEST).read_text())
    change(facts)
    (copied / MANIFEST).write_text(json.dumps(facts))
    with pytest.raises(BundleError, match=words):
        Manifest.load(copied)


def test_the_published_schema_is_the_manifests() -> None:
    published = ROOT / "docs" / "manifest.schema.json"
    assert json.loads(published.read_text()) == Manifest.model_json_schema(), "run scripts/schema"


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../other", "onnx/../../other", "a\\b"])
def test_no_path_leaves_the_folder(path: str) -> None:
    with pytest.raises(ValueError, match="leaves the bundle's folder"):
        File(path=path, size=0, sha256="0" * 64)


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def interrupted(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
