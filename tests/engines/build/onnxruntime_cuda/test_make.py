"""What compiling for ONNX Runtime's CUDA provider leaves in a bundle. It needs no GPU."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
from rich.console import Console

from engines.build import compile as compiling
from engines.build.compile import EngineOptions, compile_backend
from engines.build.onnxruntime_cuda import make
from engines.build.onnxruntime_cuda.make import SUFFIX
from engines.build.onnxruntime_cuda.rewrite import Counts, rewrite
from engines.build.outline import compile_stages
from engines.build.tables import inspect_tables
from engines.contract import GRAPHS
from engines.demo import BUNDLE
from engines.errors import EngineError
from engines.manifest import Build, Manifest
from tests.support.checkpoints import NoteRecorder

BACKEND = "onnxruntime_cuda"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(BUNDLE, tmp_path_factory.mktemp("bundle") / "demo"))


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "installed", lambda _: "1.31.1")


def compiled(bundle: Path, *, force: bool = False) -> tuple[Build, list[str]]:
    """The build, and the graphs that were not made again."""
    progress = NoteRecorder()
    options = EngineOptions("fp32", force=force)
    return compile_backend(Manifest.read(bundle), bundle, BACKEND, options, progress=progress), progress.notes


@pytest.fixture(scope="module")
def built(bundle: Path) -> Build:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "installed", lambda _: "1.31.1")
        return compiled(bundle)[0]


def test_each_graph_lies_beside_the_weights_that_it_shares(bundle: Path, built: Build) -> None:
    exported = Manifest.read(bundle).graphs
    for name in GRAPHS:
        graph, *weights = built.engines[name].files
        assert graph.path == f"onnx/{name}{SUFFIX}"
        assert tuple(weights) == exported[name].onnx["fp32"].files[1:]
    manifest = Manifest.read(bundle).model_copy(update={"builds": {BACKEND: built}})
    manifest.save(bundle)
    Manifest.load(bundle)  # which verifies every file


def test_what_was_fused_is_told(bundle: Path, built: Build) -> None:
    layers = built.engines["denoise"].layers
    assert layers
    assert (layers.fused_attentions, layers.fused_group_norms, layers.channels_last) == (14, 30, 50)
    manifest = Manifest.read(bundle).model_copy(update={"builds": {BACKEND: built}})
    console = Console(width=200)
    with console.capture() as capture:
        console.print(inspect_tables(manifest))
    assert all(fused in capture.get() for fused in ("14 of 14", "30 of 30", "50 of 50"))


@pytest.mark.usefixtures("built")
def test_unchanged_graphs_are_kept(bundle: Path) -> None:
    assert compiled(bundle)[1] == [f"{name} of {BACKEND}: unchanged" for name in GRAPHS]
    (bundle / f"onnx/decode{SUFFIX}").write_bytes(b"damaged")
    assert f"decode of {BACKEND}: unchanged" not in compiled(bundle)[1]


def test_its_stages_are_announced() -> None:
    stages = list(compile_stages(BACKEND, dict.fromkeys(GRAPHS, "fp16"), verify=False))
    assert stages == [f"compiling {name} for {BACKEND}" for name in GRAPHS]


def test_a_graph_that_strays_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Path(shutil.copytree(BUNDLE, tmp_path / "demo"))

    def unmasked(path: Path, out: Path) -> Counts:
        """As `rewrite`, with one attention to later tokens too."""
        counts, model = rewrite(path, out), ir.load(out)
        attention = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
        attention.attributes["unidirectional"] = ir.AttrInt64("unidirectional", 0)
        ir.save(model, out)
        return counts

    monkeypatch.setattr(make, "rewrite", unmasked)
    with pytest.raises(EngineError, match="this model cannot be compiled for onnxruntime_cuda"):
        compiled(bundle)
    assert not list(bundle.rglob(f"*{SUFFIX}"))


def test_a_missing_package_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("engines.build.onnxruntime_cuda.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxscript.rewriter", None)
    with pytest.raises(EngineError, match=r"needs the package onnxscript.rewriter: .*\[cuda\]"):
        compiled(bundle, force=True)
