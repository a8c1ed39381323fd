"""Graphs, profiles and packages that TensorRT does not accept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.backends.registry import install_command
from engines.build.trt.errors import BuildError, GraphRefused, Unavailable
from engines.build.trt.messages import Ranges
from engines.build.trt.parent import build_engine
from engines.errors import EngineError
from engines.progress import NullProgress
from tests.engines.build.trt.block import SIDE, Drawn, rows, save
from tests.engines.build.trt.builds import RTX, pretend


def refused(kind: type[BuildError], graph: Path, out: Path, module: str = RTX, profile: Ranges | None = None) -> str:
    """The message of a build that must fail; it leaves nothing behind."""
    with pytest.raises(EngineError) as failure:
        build_engine(module, graph, out, [profile or rows(1)], progress=NullProgress())
    assert type(failure.value) is kind
    if out.parent.is_dir():
        assert not [path for path in out.parent.iterdir() if out.name in path.name]
    return str(failure.value)


def test_an_operator_that_tensorrt_does_not_know_is_named(tmp_path: Path) -> None:
    graph = Drawn(np.float32)
    output = graph.node("Relu", graph.node("Bernoulli", "x"))
    path = save(tmp_path / "odd.onnx", graph, {"x": ["R", 4, SIDE, SIDE]}, {output: ["R", 4, SIDE, SIDE]})
    message = refused(GraphRefused, path, tmp_path / "odd.engine")
    assert "node 'node_Bernoulli_0' (Bernoulli): not supported (UNSUPPORTED_NODE)" in message
    assert "Export the graph again" in message


@pytest.mark.parametrize("content", [None, b"not a graph" * 40])
def test_a_file_that_is_no_graph_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "graph.onnx"
    if content:
        path.write_bytes(content)
    assert str(path) in refused(GraphRefused, path, tmp_path / "it.engine")


def test_profiles_must_be_of_the_graphs_inputs(graph: Path, tmp_path: Path) -> None:
    message = refused(GraphRefused, graph, tmp_path / "it.engine", profile={"y": rows(1)["x"]})
    assert "inputs are ['x'], the profile's ['y']" in message


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (((4, 4, 8, 8), (1, 4, 8, 8), (2, 4, 8, 8)), "MIN<=OPT<=MAX"),
        (((1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8)), "Dimension mismatch for tensor x"),
    ],
)
def test_impossible_shapes_are_reported_with_tensorrts_reason(
    graph: Path, tmp_path: Path, shapes: tuple[tuple[int, ...], ...], reason: str
) -> None:
    least, best, largest = shapes
    with pytest.raises(BuildError, match=reason) as failure:
        build_engine(RTX, graph, tmp_path / "it.engine", [{"x": (least, best, largest)}], progress=NullProgress())
    assert "cudaError" not in str(failure.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_module_is_refused_before_anything_is_started(graph: Path, tmp_path: Path, child: list[int]) -> None:
    assert "choose one of tensorrt, tensorrt_rtx" in refused(Unavailable, graph, tmp_path / "it.engine", "tensorflow")
    assert child == []


@pytest.mark.parametrize(("module", "extra"), [("tensorrt", "cuda"), ("tensorrt_rtx", "rtx")])
def test_a_missing_package_is_named_with_what_installs_it(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    pretend(monkeypatch, tmp_path, module, f"raise ModuleNotFoundError(\"No module named '{module}'\")")
    assert install_command(extra) in refused(Unavailable, graph, tmp_path / "it.engine", module)


def test_a_package_without_its_libraries_is_to_be_installed_again(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, "tensorrt", "raise OSError('libnvinfer.so.11: cannot open shared object file')")
    message = refused(Unavailable, graph, tmp_path / "it.engine", "tensorrt")
    assert "libnvinfer.so.11" in message
    assert "--force-reinstall" in message


def test_full_tensorrt_is_not_started_without_a_gpu(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, "tensorrt", "def Builder(logger): raise SystemExit('started all the same')")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    message = refused(Unavailable, graph, tmp_path / "it.engine", "tensorrt")
    assert "this machine has none (cudaError" in message
    assert "tensorrt_rtx, which needs no GPU" in message
