"""The manifest verifies its files and its graphs' inputs, and is written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.manifest import MANIFEST, BundleError, File, Manifest
from tests import ROOT


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def test_what_was_saved_is_what_is_loaded(copied: Path, manifest: Manifest) -> None:
    (copied / MANIFEST).unlink()
    manifest.save(copied)
    assert Manifest.load(copied) == manifest


def test_every_file_is_verified(copied: Path, manifest: Manifest) -> None:
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
        (lambda fields: fields["graphs"].pop("decode"), "graph decode is missing"),
        (lambda fields: fields.update(format=1), "has format 1, and this version reads format 2. Build it again"),
        (
            lambda fields: fields["graphs"]["decode"]["outputs"].pop(),
            "outputs of the graph decode are images, and this version has images, is_finite. Build it again",
        ),
        (
            lambda fields: fields["graphs"]["denoise"]["inputs"][0].update(shape=["S", 4, 4, "h", "w"]),
            r"inputs of the graph denoise: state is float32 .*4, 4, .*, not float32 \['S', 5, 'c', 'h', 'w'\]",
        ),
        (
            lambda fields: fields["graphs"]["denoise_shallow"]["inputs"][4].update(dtype="int32"),
            "slot is int32 .*, not int64",
        ),
        (lambda fields: fields["graphs"]["decode"]["onnx"].pop("fp32"), "graph in fp32"),
        (lambda fields: fields["builds"]["onnxruntime"]["engines"].pop("decode"), "engine of decode is missing"),
        (lambda fields: fields.update(rows=[4, 2]), "do not ascend"),
        (lambda fields: fields["preview"][0].pop(), "not for 4 channels and a constant"),
        (lambda fields: fields["preview"].pop(), "preview: .* at least 3 items"),
        (lambda fields: fields["noise_schedule"].update(trained_betas=[0.1, 0.2]), "2 trained_betas for 1000"),
    ],
)
def test_invalid_fields_are_refused(copied: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    fields = json.loads((copied / MANIFEST).read_text())
    change(fields)
    (copied / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(BundleError, match=words):
        Manifest.load(copied)


def test_the_published_schema_is_the_manifests() -> None:
    published = ROOT / "docs" / "manifest.schema.json"
    assert json.loads(published.read_text()) == Manifest.model_json_schema(), "run scripts/schema"


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../other", "onnx/../../other", "a\\b"])
def test_no_path_leaves_the_folder(path: str) -> None:
    with pytest.raises(ValueError, match="leaves the bundle's folder"):
        File(path=path, size=0, sha256="0" * 64)
