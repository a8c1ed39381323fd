"""A bundle's weights on disk: one file per graph, which all precisions of the graph read.

The FP32 graph's file is the index. A graph that computes in another type names the same weights, behind a cast where
they are stored in another one; every compiler folds such casts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from engines.contract import Array
from engines.files import replacing, replacing_all
from engines.manifest import Storage

_LARGE = 1024  # values of a tensor that is worth halving, or sharing
_SAME = 2**-7  # two roundings of one weight differ by less than this, relative to the largest


def save_reference(model: ir.Model, path: Path, *, storage: Storage) -> tuple[Path, ...]:
    """Write an FP32 graph to `path` and its weights to the same folder. Returns both paths."""
    if storage == "fp16":
        _halve(model.graph)
    _sort(model.graph)
    weights = path.with_suffix(".weights")
    with replacing_all(weights, path) as folder:  # a graph never refers to weights of another build
        ir.save(model, folder / path.name, external_data=weights.name)
        onnx.checker.check_model(folder / path.name)
    return path, weights


def save_typed(model: ir.Model, path: Path, *, reference: Path) -> tuple[Path, ...]:
    """Write a graph of another precision to `path`, over the weights of the FP32 graph at `reference`."""
    _share(model.graph, ir.load(reference).graph)
    return save_variant(model, path, weights=reference.with_suffix(".weights"))


def save_variant(model: ir.Model, path: Path, *, weights: Path) -> tuple[Path, ...]:
    """Write a graph to `path` that refers to the weights of another one, in the file `weights` of the same folder."""
    with replacing(path) as temporary:  # in the same folder, where the weights' relative path holds
        ir.save(model, temporary)
        onnx.checker.check_model(temporary)
    return path, weights


def promoted(path: Path, *, out: Path) -> None:
    """Write the graph at `path` to `out` with FP32 in place of BF16, for runtimes that cannot compute in BF16."""
    model = ir.load(path)
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.BFLOAT16:
            value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=name)
            value.dtype = ir.DataType.FLOAT
    for node in model.graph:
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.BFLOAT16:
                wide = ir.tensor(attribute.value.numpy().astype(np.float32))
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, wide)
        if node.op_type == "Cast" and node.attributes["to"].value == ir.DataType.BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
        for output in node.outputs:
            output.type = None
    ir.save(model, out, external_data=f"{out.name}.weights")


def _sort(graph: ir.Graph) -> None:
    """Order weights by name, so that their file stays the same however the graph around them changes."""
    ordered = sorted(graph.initializers.items())
    graph.initializers.clear()
    for _name, weight in ordered:
        graph.initializers.add(weight)


def _halve(graph: ir.Graph) -> None:
    """Store weights as FP16 and cast them to FP32, once, when a backend folds constants at load.

    A weight is a large matrix or kernel. Vectors stay: they are small, and the timestep frequencies among them would
    lose digits that matter. So does what FP16 cannot hold, such as a causal mask.
    """
    for name, weight in list(graph.initializers.items()):
        array, tensor = _as_weight(weight), weight.const_value
        if array is None or tensor is None or array.dtype != np.float32:
            continue
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if np.isfinite(half).all():
            _replace(graph, weight, _halved(tensor, name))


def _halved(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """A tensor in FP16, made when it is written: all weights of a graph may be more than memory holds."""
    return ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().astype(np.float16)),
        ir.DataType.FLOAT16,
        ir.Shape(tensor.shape.numpy()),
        name=name,
    )


def _share(graph: ir.Graph, reference: ir.Graph) -> None:
    """Point the weights of `graph` at those of `reference` that bear the same name and hold the same values."""
    for name, weight in list(graph.initializers.items()):
        array = _as_weight(weight)
        stored = reference.initializers.get(name)
        if array is None or stored is None or not isinstance(stored.const_value, ir.ExternalTensor):
            continue
        if _agree(array, stored.const_value.numpy()):
            _replace(graph, weight, stored.const_value)


def _agree(typed: Array, stored: Array) -> bool:
    if typed.shape != stored.shape:
        return False
    wide, other = typed.astype(np.float32), stored.astype(np.float32)
    return bool(np.abs(wide - other).max() <= _SAME * np.abs(other).max())


def _as_weight(value: ir.Value) -> Array | None:
    """The values of a matrix or kernel; None for what is small, or is no weight."""
    tensor = value.const_value
    if tensor is None or not tensor.dtype.is_floating_point() or len(tensor.shape) < 2 or tensor.size < _LARGE:
        return None
    return tensor.numpy()


def _replace(graph: ir.Graph, weight: ir.Value, stored: ir.TensorProtocol) -> None:
    """Let `stored` stand for `weight`, under its name, cast to its type if that is another."""
    name, wanted = str(weight.name), weight.const_value.dtype if weight.const_value else None
    if wanted == stored.dtype:
        weight.const_value = stored
        return
    value = ir.Value(
        name=name, shape=ir.Shape(stored.shape.numpy()), type=ir.TensorType(stored.dtype), const_value=stored
    )
    cast = ir.node("Cast", [value], {"to": wanted})
    weight.replace_all_uses_with(cast.outputs[0])
    del graph.initializers[name]
    graph.initializers.add(value)
    graph.insert_before(graph[0], cast)
