"""Real graphs with a known fault, in ONNX Runtime: the bisection names exactly that layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engines.accuracy import tolerance
from engines.backends.device import Device, Reader, Stream
from engines.backends.onnxruntime import OnnxRuntimeDevice, OnnxRuntimeEngine
from engines.backends.registry import open_device
from engines.build.bisect.finding import Finding
from engines.build.bisect.graph import Graph
from engines.build.bisect.locate import Case, locate
from engines.build.bisect.measure import Compile, MarkedEngine
from engines.build.trt.parent import build_engine
from engines.contract import Array
from engines.manifest import Precision
from engines.progress import NullProgress
from tests.engines.build.trt.block import SIDE, draw, rows
from tests.engines.build.trt.builds import RTX

Damage = Callable[[Array], Array]


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """Convolution, GroupNorm, SiLU, convolution, GroupNorm, LayerNorm and attention, in FP32."""
    return draw(tmp_path / "fp32.onnx", dtype=np.float32)


def damaged(path: Path, out: Path, nodes: list[str], damage: Damage) -> Path:
    """The graph with another weight in each of `nodes`."""
    model = onnx.load(path)
    for node in model.graph.node:
        if node.name in nodes:
            weight = next(one for one in model.graph.initializer if one.name == node.input[1])
            array = numpy_helper.to_array(weight)
            weight.CopyFrom(numpy_helper.from_array(damage(array).astype(array.dtype), weight.name))
    onnx.save(model, out)
    return out


def bisected(
    path: Path,
    reference: Path,
    precision: Precision = "fp32",
    *,
    device: Device | None = None,
    compile: Compile = lambda marked: marked,
) -> Finding:
    graph, exact = Graph(path), Graph(reference)
    counterparts = graph.counterparts(exact)
    dtype = np.float32 if precision == "fp32" else np.float16
    x = np.random.default_rng(0).standard_normal((2, 4, SIDE, SIDE)).astype(dtype)
    engine = MarkedEngine(
        graph,
        exact,
        counterparts,
        device=device or open_device("onnxruntime"),
        compile=compile,
        inputs={"x": x},
        tolerance=tolerance(precision, ()),
        tolerance_of_outputs=tolerance(precision, ()),
    )
    return locate(engine, graph, counterparts, Case("denoise", "onnxruntime", precision, "noise"))


def named(path: Path, operator: str) -> list[str]:
    return [node.name for node in onnx.load(path).graph.node if node.op_type == operator]


def half(array: Array) -> Array:
    return array * 0.5


def loudly(array: Array) -> Array:
    return np.clip(array.astype(np.float32) * 2**18, -6e4, 6e4)


@pytest.mark.parametrize(
    ("operator", "which", "damage"),
    [
        ("Conv", 0, half),  # the first node
        ("Conv", 1, half),
        ("LayerNormalization", 0, half),
        ("MatMul", 0, loudly),  # the query's projection: half of it would change no scores
        ("MatMul", 2, half),  # and the value's
    ],
)
def test_a_damaged_weight_is_found(reference: Path, tmp_path: Path, operator: str, which: int, damage: Damage) -> None:
    node = named(reference, operator)[which]
    path = damaged(reference, tmp_path / "engine.onnx", [node], damage)
    finding = bisected(path, reference)
    assert finding.first is not None
    assert (finding.first.node, finding.first.operator) == (node, operator)
    assert finding.rounds <= 6
    assert "other weights here than the FP32 graph" in finding.advice
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []


def test_a_fault_of_the_last_node_is_found(reference: Path, tmp_path: Path) -> None:
    model = onnx.load(reference)
    last = model.graph.node[-1]
    last.op_type = "Sub"  # where the FP32 graph adds
    onnx.save(model, tmp_path / "engine.onnx")
    finding = bisected(tmp_path / "engine.onnx", reference)
    assert finding.first is not None
    assert finding.first.node == last.name
    (shown,) = [row for row in finding.rows if row.place == finding.first]
    assert not shown.reading.passed
    assert all(row.reading.passed for row in finding.rows if row.place != finding.first)


def test_engines_of_openvino_are_marked_alike(reference: Path, tmp_path: Path) -> None:
    node = named(reference, "Conv")[1]
    path = damaged(reference, tmp_path / "engine.onnx", [node], half)
    finding = bisected(path, reference, device=open_device("openvino"))
    assert finding.first is not None
    assert finding.first.node == node


def test_of_two_faults_the_first_is_named(reference: Path, tmp_path: Path) -> None:
    nodes = [named(reference, "Conv")[1], named(reference, "MatMul")[1]]
    finding = bisected(damaged(reference, tmp_path / "engine.onnx", nodes, half), reference)
    assert finding.first is not None
    assert finding.first.node == nodes[0]


def test_what_lies_around_it_is_shown_with_errors_before_and_after(reference: Path, tmp_path: Path) -> None:
    node = named(reference, "Conv")[1]
    finding = bisected(damaged(reference, tmp_path / "engine.onnx", [node], half), reference)
    assert [row.place.operator for row in finding.rows] == ["Mul", "Conv", "Reshape", "Shape"][: len(finding.rows)]
    before, first = finding.rows[0].reading, finding.rows[1].reading
    assert before.relative < 1e-5
    assert 0.3 < first.relative < 0.7
    assert first.computed < first.expected


def infinite(array: Array) -> Array:
    loud = loudly(array)
    loud[0] = np.inf
    return loud


def test_overflow_of_fp16_is_named_with_the_wider_type(reference: Path, tmp_path: Path) -> None:
    """ONNX Runtime computes FP16 in FP32 on a CPU, so the infinity has to be in the weights."""
    node = named(reference, "Conv")[1]
    loud = damaged(reference, tmp_path / "loud.onnx", [node], loudly)
    path = damaged(draw(tmp_path / "plain.onnx", dtype=np.float16), tmp_path / "fp16.onnx", [node], infinite)
    finding = bisected(path, loud, "fp16")
    assert finding.first is not None
    assert finding.first.node == node
    assert finding.advice.startswith("overflow: fp16 ends at 65504")
    assert finding.advice.endswith("compile with --precision bf16, or fp32.")


class FakeGpu(OnnxRuntimeDevice):
    """Runs a built engine as the ONNX graph that it was built from, which lies next to it."""

    def load(self, path: Path, stream: Stream, *, read: Reader = Path.read_bytes) -> OnnxRuntimeEngine:
        assert path.stat().st_size > 1_000_000
        return super().load(path.with_suffix(".onnx"), stream, read=read)


def test_marked_graphs_are_built_by_tensorrt(reference: Path, tmp_path: Path) -> None:
    """By TensorRT for RTX, which needs no GPU to build; running its engines is left to the fake."""

    def build(marked: Path) -> Path:
        engine = tmp_path / "built.engine"
        build_engine(RTX, marked, engine, [rows(2)], progress=NullProgress())
        shutil.copy(marked, engine.with_suffix(".onnx"))
        return engine

    node = named(reference, "MatMul")[2]
    plain = draw(tmp_path / "plain.onnx", dtype=np.float16)
    path = damaged(plain, tmp_path / "fp16.onnx", [node], lambda array: array * -8)
    finding = bisected(path, reference, "fp16", device=FakeGpu(threads=1), compile=build)
    assert finding.first is not None
    assert finding.first.node == node


def test_the_same_graph_in_fp16_agrees(reference: Path, tmp_path: Path) -> None:
    finding = bisected(draw(tmp_path / "fp16.onnx", dtype=np.float16), reference, "fp16")
    assert finding.first is None
    assert "with tensors marked as outputs the engine agrees" in finding.advice
