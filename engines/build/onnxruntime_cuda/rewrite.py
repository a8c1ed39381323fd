"""From an exported graph to the one that ONNX Runtime's CUDA provider computes: the same function, by its operators."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from engines.build.onnxruntime_cuda.attention import fuse_attention
from engines.build.onnxruntime_cuda.group_norm import fuse_group_norm
from engines.build.onnxruntime_cuda.layout import use_channels_last
from engines.build.onnxruntime_cuda.values import MICROSOFT
from engines.files import replacing

IR_VERSION = 10  # onnx writes a newer one than ONNX Runtime reads


@dataclass(frozen=True, slots=True)
class Counts:
    """How many of a graph's operators were replaced, of how many."""

    attentions: tuple[int, int]
    group_norms: tuple[int, int]
    convolutions: tuple[int, int]
    transposes: int  # of activations that are left
    operators: int  # of all kinds


def rewrite(path: Path, out: Path) -> Counts:
    """Write the graph at `path` to `out`, in the same folder, with the fused operators of ONNX Runtime's CUDA provider.

    Weights stay where they are: the new graph refers to the files that the old one does. What has no fused operator, or
    one that does not support it, stays as it is.
    """
    model = ir.load(path)
    counts = rewritten(model)
    with replacing(out) as temporary:  # in the same folder, where the weights' relative path holds
        ir.save(model, temporary)
        onnx.checker.check_model(temporary)
    return counts


def rewritten(model: ir.Model) -> Counts:
    """Rewrite `model` in place."""
    passes.ShapeInferencePass()(model)
    before = Counter(node.op_type for node in model.graph)
    attentions, group_norms = fuse_attention(model), fuse_group_norm(model)
    passes.RemoveUnusedNodesPass()(model)
    convolutions = use_channels_last(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    _tidy(model)
    constant = _constants(model.graph)
    varying = [node for node in model.graph if node not in constant]
    return Counts(
        attentions=(attentions, before["Softmax"]),
        group_norms=(group_norms, before["InstanceNormalization"]),
        convolutions=(convolutions, before["Conv"]),
        transposes=sum(node.op_type == "Transpose" for node in varying),
        operators=len(varying),
    )


def _constants(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that depend on weights alone, so that ONNX Runtime computes them when it loads the graph."""
    found: set[ir.Node] = set()
    for node in graph:  # in the order of their computation
        if all(value is None or value.is_initializer() or value.producer() in found for value in node.inputs):
            found.add(node)
    return found


def _tidy(model: ir.Model) -> None:
    """Drop what was inferred on the way, as the exporter's graphs do, and name the operators' domains."""
    model.ir_version = IR_VERSION
    model.graph.opset_imports[MICROSOFT] = 1
    outputs = set(model.graph.outputs)
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            if value not in outputs:
                value.shape = None
