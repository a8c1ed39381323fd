"""What the server gives out of a bundle is what it verified; of what changes later it hears."""

from __future__ import annotations

import queue
import shutil
from pathlib import Path

import pytest

from engines.errors import BundleError, EngineError
from engines.manifest import MANIFEST, Manifest
from server.startup import served_files
from server.startup.served_files import OpenedBundle, ServedFiles, open_bundles
from server.startup.settings import ServerSettings
from tests import ROOT

DEMO = ROOT / "engines" / "demo"
WAIT = 30  # seconds at most


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(DEMO / "onnx", tmp_path / "onnx")
    for name in (MANIFEST, "tokenizer.json"):
        shutil.copy(DEMO / name, tmp_path)
    return tmp_path


def opened(bundle: Path) -> OpenedBundle:
    (found,) = open_bundles(ServerSettings(bundle=(str(bundle),), backend="onnxruntime"))
    return found


def flip(path: Path) -> None:
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.write(bytes([content[0] ^ 1]))


def test_a_file_replaced_after_its_check_is_not_served(copied: Path) -> None:
    """As while backends are measured, which takes minutes."""
    bundle = opened(copied)
    weights = copied / "onnx/denoise.weights"
    weights.rename(copied / "kept")
    shutil.copy(copied / "kept", weights)
    flip(weights)
    with pytest.raises(BundleError, match=r"denoise\.weights was changed or replaced while it was loaded: start again"):
        bundle.files.loaded(bundle.manifest, "onnxruntime", lambda _error: None)


def test_graphs_are_given_out_as_they_were_hashed(copied: Path) -> None:
    bundle, graph = opened(copied), copied / "onnx/decode.onnx"
    content = graph.read_bytes()
    (copied / "other").write_bytes(b"other")
    (copied / "other").replace(graph)
    assert bundle.files.read(graph) == content


def test_altered_weights_are_reported_once(copied: Path) -> None:
    manifest, heard = Manifest.read(copied), queue.SimpleQueue[BundleError]()
    files = ServedFiles(copied, manifest.hold(copied), every=0.01)
    files.loaded(manifest, "onnxruntime", heard.put)
    (copied / "onnx/decode.weights").touch()  # which alters nothing
    flip(copied / "onnx/denoise.weights")
    assert "denoise.weights was altered" in str(heard.get(timeout=WAIT))
    assert heard.empty()


def test_the_manifest_may_be_rewritten_while_it_serves(copied: Path) -> None:
    """A build does so, and replaces files as well."""
    bundle = opened(copied)
    bundle.manifest.model_copy(update={"name": "other"}).save(copied)
    bundle.files.loaded(bundle.manifest, "onnxruntime", lambda _error: None)


def test_a_bundle_without_engines_for_the_backend_is_refused(copied: Path) -> None:
    bundle = opened(copied)
    with pytest.raises(EngineError, match="holds no engines for tensorrt"):
        bundle.files.loaded(bundle.manifest, "tensorrt", lambda _error: None)


def test_engines_of_tensorrt_are_hashed_when_they_are_read(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.read(copied)
    engines = manifest.model_copy(update={"builds": {"tensorrt": manifest.builds["onnxruntime"]}})
    engines.save(copied)
    monkeypatch.setattr(served_files, "candidate_backends", lambda _settings, _manifest: ["tensorrt"])
    flip(copied / "onnx/decode.onnx")
    (bundle,) = open_bundles(ServerSettings(bundle=(str(copied),), compile=True))
    with pytest.raises(BundleError, match=r"decode\.onnx is not the file that was built"):
        bundle.files.read(copied / "onnx/decode.onnx")
    bundle.files.read(copied / "onnx/denoise.onnx")


def test_engines_that_are_yet_to_be_compiled_are_not_missed(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_files, "candidate_backends", lambda _settings, _manifest: ["tensorrt"])
    (bundle,) = open_bundles(ServerSettings(bundle=(str(copied),), compile=True))
    assert bundle.backends == ["tensorrt"]
