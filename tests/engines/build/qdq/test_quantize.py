"""ModelOpt puts the ranges of eight bits around layers, and leaves weights where they are."""

from __future__ import annotations

import inspect
import shutil
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest

from engines.build.qdq import graphs as made_graphs
from engines.build.qdq import quantize as module
from engines.build.qdq.graphs import QuantizedGraphs
from engines.build.qdq.quantize import EIGHT_BITS, EightBits, modelopt_version, quantize
from engines.build.trajectory import Recording, Trajectory, reference
from engines.contract import Array, GraphName
from engines.demo import BUNDLE as DEMO
from engines.errors import EngineError
from engines.manifest import Manifest
from engines.progress import NullProgress

with_modelopt = pytest.mark.skipif(find_spec("modelopt") is None, reason="ModelOpt is not installed: extra quantize")


@pytest.fixture(scope="module")
def recording() -> Recording:
    manifest = Manifest.load(DEMO)
    return Trajectory(manifest, DEMO, steps=4).run(reference(manifest, DEMO))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The demo's graphs. Those in FP32 stand for the ones in FP16, which it lacks: the same layers are quantized."""
    return Path(shutil.copytree(DEMO, tmp_path / "demo"))


@pytest.fixture
def manifest() -> Manifest:
    found = Manifest.load(DEMO)
    graphs = {
        name: graph.model_copy(update={"onnx": graph.onnx | {"fp16": graph.onnx["fp32"]}})
        for name, graph in found.graphs.items()
    }
    return found.model_copy(update={"graphs": graphs})


def shallow(folder: Path, out: str, precision: EightBits, recording: Recording) -> tuple[Path, ...]:
    graph = folder / "onnx" / "denoise_shallow.onnx"
    return quantize(graph, graph.with_name(out), reference=graph, precision=precision, recording=recording.shallow)


@with_modelopt
@pytest.mark.parametrize("precision", EIGHT_BITS)
def test_weights_are_shared_and_only_layers_are_quantized(
    copied: Path, recording: Recording, precision: EightBits, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    graph, weights = shallow(copied, f"denoise_shallow.{precision}.onnx", precision, recording)
    assert {path: path.read_bytes() for path in before} == before
    assert {path for path in copied.rglob("*") if path.is_file()} - before.keys() == {graph}
    assert weights == copied / "onnx" / "denoise_shallow.weights"
    assert graph.stat().st_size < 50_000 < weights.stat().st_size
    model = onnx.load(graph, load_external_data=False).graph
    eight_bits = onnx.TensorProto.FLOAT8E4M3FN if precision == "fp8" else onnx.TensorProto.INT8
    points = {tensor.data_type for tensor in model.initializer if tensor.name.endswith("_zero_point")}
    assert points == {eight_bits}
    made_by = {name: node for node in model.node for name in node.output}
    layers = [node for node in model.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    dequantized = [{made_by[name].op_type for name in node.input[:2] if name in made_by} for node in layers]
    assert dequantized.count({"DequantizeLinear"}) == 2  # both convolutions of its one block
    assert "DequantizeLinear" not in set().union(*(kinds for kinds in dequantized if kinds != {"DequantizeLinear"}))
    assert capfd.readouterr() == ("", "")


@with_modelopt
def test_a_graph_is_made_once_and_compared(copied: Path, manifest: Manifest, recording: Recording) -> None:
    asked: list[int] = []

    def recordings() -> dict[GraphName, tuple[dict[str, Array], ...]]:
        asked.append(1)
        return {"denoise_shallow": recording.shallow}

    graphs = QuantizedGraphs(manifest, copied, recordings, NullProgress())
    made = graphs.graph("denoise_shallow", "fp8", key="a")
    assert 1e-4 < made.difference.mean < made.difference.largest < 0.2
    assert graphs.graph("denoise_shallow", "fp8", key="a") == made
    assert len(asked) == 1
    (copied / made.files[0].path).write_bytes(b"damaged")
    assert graphs.graph("denoise_shallow", "fp8", key="a") == made
    graphs.graph("denoise_shallow", "fp8", key="b")
    assert len(asked) == 3


@with_modelopt
def test_a_broken_calibration_is_caught_before_a_gpu_sees_it(
    copied: Path, manifest: Manifest, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    def narrow(*arguments: Any, **options: Any) -> tuple[Path, ...]:
        paths = quantize(*arguments, **options)
        model = onnx.load(paths[0], load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.name.endswith("_scale") and not tensor.dims:
                tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) / 100, tensor.name))
        onnx.save(model, paths[0])
        return paths

    monkeypatch.setattr(made_graphs, "quantize", narrow)
    graphs = QuantizedGraphs(manifest, copied, lambda: {"denoise_shallow": recording.shallow}, NullProgress())
    with pytest.raises(EngineError, match=r"differs from FP32 by .*--precision fp16"):
        graphs.graph("denoise_shallow", "int8", key="a")
    assert not list(copied.rglob("*.int8.json"))


@with_modelopt
def test_what_is_passed_to_modelopt_exists() -> None:
    from modelopt.onnx.quantization import quantize as run  # noqa: PLC0415 - takes seconds

    passed = {
        "quantize_mode",
        "output_path",
        "nodes_to_quantize",
        "op_types_to_quantize",
        "calibration_data_reader",
        "calibration_method",
        "calibration_eps",
        "high_precision_dtype",
        "use_external_data_format",
        "log_level",
    }
    assert passed <= inspect.signature(run).parameters.keys()


def test_without_modelopt_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", missing)
    with pytest.raises(EngineError, match=r"need the package nvidia-modelopt: .*quantize"):
        modelopt_version()
