"""Weights lie on disk once, whole or not at all, and every graph over them computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engines.export.weights import promoted, save_reference, save_typed

WEIGHT = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)


def model(kind: int, weight: NDArray[np.float32] = WEIGHT) -> ir.Model:
    """y = x @ w + b, inside in type `kind`, outside in FP32."""
    tensor = numpy_helper.from_array(weight, "w")
    if kind != TensorProto.FLOAT:
        tensor = helper.make_tensor("w", kind, weight.shape, weight.flatten().tolist())
    bias = helper.make_tensor("b", kind, [64], np.linspace(-1, 1, 64).tolist())
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=kind),
        helper.make_node("MatMul", ["narrow", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.FLOAT),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [tensor, bias])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(made)


def run(path: Path) -> NDArray[np.float32]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    y: NDArray[np.float32] = session.run(None, {"x": X})[0]
    return y


EXPECTED = X @ WEIGHT + np.linspace(-1, 1, 64, dtype=np.float32)


@pytest.mark.parametrize(("storage", "size", "error"), [("fp32", 4 * 64 * 64, 1e-5), ("fp16", 2 * 64 * 64, 2e-2)])
def test_the_fp32_graph_reads_its_weights_in_either_type(tmp_path: Path, storage: str, size: int, error: float) -> None:
    graph, weights = save_reference(model(TensorProto.FLOAT), tmp_path / "g.onnx", storage=storage)  # type: ignore[arg-type] # parametrized
    assert size <= weights.stat().st_size < size + 4096
    assert graph.stat().st_size < 2000
    assert np.abs(run(graph) - EXPECTED).max() < error


@pytest.mark.parametrize("storage", ["fp32", "fp16"])
def test_a_typed_graph_reads_the_same_weights(tmp_path: Path, storage: str) -> None:
    path, weights = save_reference(model(TensorProto.FLOAT), tmp_path / "g.onnx", storage=storage)  # type: ignore[arg-type] # parametrized
    before = weights.read_bytes()
    typed, shared = save_typed(model(TensorProto.FLOAT16), tmp_path / "g.fp16.onnx", reference=path)
    assert shared == weights
    assert weights.read_bytes() == before
    assert typed.stat().st_size < 2000
    assert np.abs(run(typed) - EXPECTED).max() < 5e-2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["g.fp16.onnx", "g.onnx", "g.weights"]


def test_a_bf16_graph_runs_promoted(tmp_path: Path) -> None:
    path, _ = save_reference(model(TensorProto.FLOAT), tmp_path / "g.onnx", storage="fp32")
    typed, _ = save_typed(model(TensorProto.BFLOAT16), tmp_path / "g.bf16.onnx", reference=path)
    (tmp_path / "wide").mkdir()
    promoted(typed, out=tmp_path / "wide" / "g.onnx")
    assert np.abs(run(tmp_path / "wide" / "g.onnx") - EXPECTED).max() < 1e-1


def test_another_weight_under_the_same_name_is_not_shared(tmp_path: Path) -> None:
    path, _ = save_reference(model(TensorProto.FLOAT), tmp_path / "g.onnx", storage="fp32")
    typed, _ = save_typed(model(TensorProto.FLOAT16, WEIGHT * 1.1), tmp_path / "g.fp16.onnx", reference=path)
    assert typed.stat().st_size > 2 * 64 * 64
    assert np.abs(run(typed) - EXPECTED).max() > 0.5


def test_what_fp16_cannot_hold_stays_in_fp32(tmp_path: Path) -> None:
    loud = WEIGHT.copy()
    loud[0, 0] = 1e6
    path, weights = save_reference(model(TensorProto.FLOAT, loud), tmp_path / "g.onnx", storage="fp16")
    assert weights.stat().st_size >= 4 * 64 * 64
    assert np.isfinite(run(path)).all()


def test_an_interrupted_export_leaves_the_old_files_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = save_reference(model(TensorProto.FLOAT), tmp_path / "g.onnx", storage="fp32")
    before = {path: path.read_bytes() for path in files}

    def interrupted(_path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx.checker, "check_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_reference(model(TensorProto.FLOAT, WEIGHT + 1), tmp_path / "g.onnx", storage="fp32")
    with pytest.raises(KeyboardInterrupt):
        save_typed(model(TensorProto.FLOAT16), tmp_path / "g.fp16.onnx", reference=tmp_path / "g.onnx")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
