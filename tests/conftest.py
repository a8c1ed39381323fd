"""One tiny checkpoint, one bundle and one server for the whole run: each is real, and each costs seconds to make."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import build_engines
from engines.manifest import Manifest
from tests.support.safety import add_safety_checker
from tests.support.serving import Serving
from tests.support.tiny import make_checkpoint

torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much where other programs run

_SHAPES = ["--resolution", "32x32", "--resolution", "48x32", "--rows", "2,4,8"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with random weights."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-sd")


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, built by the command people use. Tests that alter a bundle copy it first."""
    out = tmp_path_factory.mktemp("bundle")
    options = ["--backend", "onnxruntime", *_SHAPES]
    assert build_engines.main(["--model", str(checkpoint), "--out", str(out), *options]) == 0
    return out


@pytest.fixture(scope="session")
def lora_bundle(checkpoint: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with graphs that apply the LoRAs of requests. Tests that alter it copy it first."""
    out = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("lora-bundle") / "copy"))  # whose graphs are kept
    options = ["--backend", "onnxruntime", *_SHAPES, "--lora-slots", "4", "--lora-rank", "8"]
    assert build_engines.main(["--model", str(checkpoint), "--out", str(out), *options]) == 0
    return out


@pytest.fixture(scope="session")
def manifest(bundle: Path) -> Manifest:
    return Manifest.load(bundle)


@pytest.fixture(scope="session")
def checked_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a safety checker that flags some of its pictures."""
    return add_safety_checker(make_checkpoint(tmp_path_factory.mktemp("checked") / "tiny-sd"))


@pytest.fixture(scope="session")
def checked_bundle(checked_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checked-bundle")
    options = ["--backend", "onnxruntime", "--rows", "2,16", "--decode-batch", "2"]
    assert build_engines.main(["--model", str(checked_checkpoint), "--out", str(out), *options]) == 0
    return out


@pytest.fixture(scope="session")
def serving(bundle: Path) -> Iterator[Serving]:
    """A server process over the tiny bundle, shared: leave it as you found it."""
    with Serving(bundle) as running:
        yield running
        assert running.client.get("/v2/health/ready").status_code == 200, "a test left the server not ready"
