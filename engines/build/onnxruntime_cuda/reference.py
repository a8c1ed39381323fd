"""What a graph for ONNX Runtime's CUDA provider computes, on any CPU and in FP32.

ONNX Runtime has `GroupNorm` and `NhwcConv` for GPUs alone. Here they are functions of ONNX's operators, written from
the operators' documentation and not from what they replace. `MultiHeadAttention` is ONNX Runtime's own on the CPU.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from engines.build.onnxruntime_cuda.values import MICROSOFT

_DOMAIN = "latentd.reference"
_GROUP_NORM = f"""
<domain: "{_DOMAIN}", opset_import: ["" : 20]>
GroupNorm <groups, epsilon, activation> (X, gamma, beta) => (Y)
{{
    first = Transpose <perm = [0, 3, 1, 2]> (X)
    count = Constant <value_ints: ints = @groups> ()
    copied = Constant <value_ints = [0]> ()
    rest = Constant <value_ints = [-1]> ()
    grouping = Concat <axis = 0> (copied, count, rest)
    grouped = Reshape (first, grouping)
    axis = Constant <value_ints = [2]> ()
    mean = ReduceMean <keepdims = 1> (grouped, axis)
    centred = Sub (grouped, mean)
    squares = Mul (centred, centred)
    variance = ReduceMean <keepdims = 1> (squares, axis)
    small = Constant <value_float: float = @epsilon> ()
    raised = Add (variance, small)
    deviation = Sqrt (raised)
    normal = Div (centred, deviation)
    sizes = Shape (first)
    image = Reshape (normal, sizes)
    last = Transpose <perm = [0, 2, 3, 1]> (image)
    scaled = Mul (last, gamma)
    shifted = Add (scaled, beta)
    gate = Sigmoid (shifted)
    silu = Mul (shifted, gate)
    chosen = Constant <value_int: int = @activation> ()
    activated = Cast <to = 9> (chosen)
    Y = Where (activated, silu, shifted)
}}
"""
_NHWC_CONV = f"""
<domain: "{_DOMAIN}", opset_import: ["" : 20]>
NhwcConv <strides, pads, dilations, group> (X, W, B) => (Y)
{{
    image = Transpose <perm = [0, 3, 1, 2]> (X)
    kernel = Transpose <perm = [0, 3, 1, 2]> (W)
    made = Conv <strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations, group: int = @group>
        (image, kernel, B)
    Y = Transpose <perm = [0, 2, 3, 1]> (made)
}}
"""
_FUNCTIONS = {"GroupNorm": _GROUP_NORM, "NhwcConv": _NHWC_CONV}


def on_cpu(model: ir.Model) -> onnx.ModelProto:
    """`model`, which is altered, as one that ONNX Runtime computes on a CPU, in FP32 throughout."""
    for text in _FUNCTIONS.values():
        function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
        model.functions[function.identifier()] = function
    model.graph.opset_imports[_DOMAIN] = 1
    for node in model.graph:
        if node.domain == MICROSOFT and node.op_type in _FUNCTIONS:
            node.domain = _DOMAIN
            _as_list(node, "groups")
    _widen(model.graph)
    return ir.to_proto(model)


def _as_list(node: ir.Node, name: str) -> None:
    """A number as a list of it, which a function can concatenate to a shape."""
    if name in node.attributes:
        node.attributes[name] = ir.AttrInt64s(name, [node.attributes[name].as_int()])


def _widen(graph: ir.Graph) -> None:
    """Compute in FP32 what the graph computes in FP16. Inputs and weights in files stay as they are, behind a cast."""
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT16:
            _cast(graph, value)
    for value in graph.outputs:
        if value.dtype == ir.DataType.FLOAT16:
            value.dtype = ir.DataType.FLOAT
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT16:
            continue
        if isinstance(tensor, ir.ExternalTensor):
            _cast(graph, value)
        else:
            value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in graph:
        _widen_node(node)


def _cast(graph: ir.Graph, value: ir.Value) -> None:
    uses = list(value.uses())
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
    graph.insert_before(graph[0], cast)
    for node, index in uses:
        node.replace_input_with(index, cast.outputs[0])


def _widen_node(node: ir.Node) -> None:
    for attribute in list(node.attributes.values()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.FLOAT16:
            wide = ir.tensor(attribute.value.numpy().astype(np.float32))
            node.attributes[attribute.name] = ir.AttrTensor(attribute.name, wide)
    if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT16:
        node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    for value in node.outputs:
        if not value.is_graph_output() and value.type is not None:
            value.type = None
