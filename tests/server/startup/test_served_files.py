"""What the server gives out of a bundle is what it verified; of what changes later it hears."""

from __future__ import annotations

import queue
import shutil
from pathlib import Path
from typing import Any

import pytest

from engines.errors import BundleError, EngineError
from engines.manifest import MANIFEST, Manifest
from server.startup import served_files
from server.startup.served_files import OpenedBundle, ServedFiles, open_bundles
from server.startup.settings import ServerSettings
from tests import ROOT
from tests.support.serving import run_server

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


def several(*given: str, **settings: Any) -> list[OpenedBundle]:
    return open_bundles(ServerSettings(bundle=given, backend="onnxruntime", **settings))


def test_each_of_several_bundles_is_verified(copied: Path) -> None:
    flip(copied / "onnx/decode.weights")
    with pytest.raises(BundleError, match=rf"{copied}/onnx/decode\.weights is not the file that was built"):
        several(str(DEMO), f"other={copied}")


def test_others_must_have_engines_for_the_backend_of_the_first(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.read(copied)
    manifest.model_copy(update={"builds": {"onnxruntime_cuda": manifest.builds["onnxruntime"]}}).save(copied)
    monkeypatch.setattr(served_files, "candidate_backends", lambda _settings, _manifest: ["onnxruntime_cuda"])
    with pytest.raises(EngineError, match="latentd-demo holds no engines for onnxruntime_cuda"):
        several(f"first={copied}", str(DEMO))


def test_models_to_load_at_the_start_are_named() -> None:
    given = str(DEMO), f"a={DEMO}", f"b={DEMO}"
    assert [bundle.at_start for bundle in several(*given)] == [True, True, True]
    assert [bundle.at_start for bundle in several(*given, load=("latentd-demo", "b"))] == [True, False, True]
    with pytest.raises(EngineError, match=r"--load c: there is no model of that name \(latentd-demo, a, b\)"):
        several(*given, load=("c",))


def test_files_are_verified_before_each_load(copied: Path) -> None:
    bundle, heard = opened(copied), queue.SimpleQueue[BundleError]()
    for _ in range(2):
        bundle.files.prepare(bundle.manifest, "onnxruntime")
        bundle.files.loaded(bundle.manifest, "onnxruntime", heard.put)
        bundle.files.unloaded()
    flip(copied / "onnx/denoise.weights")  # while nothing is served from it
    with pytest.raises(BundleError, match=r"denoise\.weights is not the file that was built"):
        bundle.files.prepare(bundle.manifest, "onnxruntime")
    flip(copied / "onnx/denoise.weights")
    bundle.files.prepare(bundle.manifest, "onnxruntime")
    assert heard.empty()


def test_two_bundles_of_one_name_end_the_start_with_one_line() -> None:
    ended = run_server("--bundle", str(DEMO), "--bundle", str(DEMO), "--port", "0")
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(f"both named latentd-demo: give one another name, as --bundle NAME={DEMO}.")
