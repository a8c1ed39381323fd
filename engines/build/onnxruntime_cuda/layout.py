"""Channels last: convolutions as `com.microsoft.NhwcConv`, and the transposes around them moved to the graph's ends.

Each node that is rewritten leaves its result twice: channels last, and transposed back for whatever reads it. Nodes
that work on either layout are then rewritten one after the other to read the former. Hardly a transpose is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from engines.build.onnxruntime_cuda.values import (
    FIRST,
    LAST,
    MICROSOFT,
    constant,
    given,
    int64,
    made_by,
    permutation,
    rank,
    size,
)
from engines.contract import Array

_ELEMENTWISE = (
    *(
        "Abs",
        "Add",
        "Cast",
        "Clip",
        "Div",
        "Equal",
        "Gelu",
        "Greater",
        "LessOrEqual",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Not",
    ),
    *("Pow", "Relu", "Round", "Sigmoid", "Sub", "Tanh", "Where"),
)


def use_channels_last(model: ir.Model) -> int:
    """Compute convolutions channels last, and what lies between them. Returns how many convolutions were replaced."""
    layout = _Layout(model.graph)
    for node in list(model.graph):
        layout.convert(node)
    return layout.convolutions


class _Layout:
    """Values [B, C, H, W] of a graph that it has channels last, too."""

    def __init__(self, graph: ir.Graph) -> None:
        self.convolutions = 0
        self._graph = graph
        self._last: dict[ir.Value, ir.Value] = {}  # channels last, by the value channels first
        self._handlers: Mapping[str, Callable[[ir.Node], None]] = {
            **dict.fromkeys(_ELEMENTWISE, self._elementwise),
            **dict.fromkeys(("ReduceMax", "ReduceMin"), self._reduce),
            "Conv": self._convolution,
            "Concat": self._concat,
            "Resize": self._resize,
            "Reshape": self._reshape,
            "Shape": self._shape,
            "Transpose": self._transpose,
        }

    def convert(self, node: ir.Node) -> None:
        """Let `node` read and compute values channels last, if it can and there are such."""
        if node.domain == "" and node.op_type in self._handlers:
            self._handlers[node.op_type](node)

    def _convolution(self, node: ir.Node) -> None:
        kernel = given(node, 1)
        if rank(kernel) != 4 or node.attributes.get_int("group", 1) != 1 or _pads_itself(node):
            return
        self.convolutions += 1
        # ONNX Runtime computes the kernels [O, H, W, I] when it loads the graph: the weights stay those of the bundle.
        turned = self._insert(node, "Transpose", [kernel], perm=LAST)
        inputs = [self._as_last(given(node, 0), node), turned, *node.inputs[2:]]
        attributes = [attribute for attribute in node.attributes.values() if attribute.name != "auto_pad"]
        made = ir.Node(MICROSOFT, "NhwcConv", inputs, attributes)
        self._graph.insert_before(node, made)
        self._replace(node, made.outputs[0])

    def _elementwise(self, node: ir.Node) -> None:
        if rank(node.outputs[0]) != 4 or self._reads_none(node):
            return
        if len(node.inputs) == 1 and node.outputs[0].is_graph_output():
            return  # what is transposed before a cast to FP32 is half as large
        inputs = [self._broadcast(value, node) for value in node.inputs]
        if any(made is None and read is not None for made, read in zip(inputs, node.inputs, strict=True)):
            return
        made = ir.Node("", node.op_type, inputs, list(node.attributes.values()))
        self._graph.insert_before(node, made)
        self._replace(node, made.outputs[0])

    def _concat(self, node: ir.Node) -> None:
        if self._reads_none(node) or node.attributes["axis"].as_int() not in {1, -3}:
            return
        inputs = [self._as_last(given(node, index), node) for index in range(len(node.inputs))]
        self._replace(node, self._insert(node, "Concat", inputs, axis=3))

    def _resize(self, node: ir.Node) -> None:
        if self._reads_none(node) or "axes" in node.attributes or node.attributes.get_string("mode", "") != "nearest":
            return
        axes = [None if value is None else self._reordered(value, LAST, node) for value in node.inputs[1:]]
        made = ir.Node("", "Resize", [self._as_last(given(node, 0), node), *axes], list(node.attributes.values()))
        self._graph.insert_before(node, made)
        self._replace(node, made.outputs[0])

    def _reduce(self, node: ir.Node) -> None:
        """Over all but the batch, in whichever order, the result is the same."""
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is not None and sorted(axes.tolist()) == [1, 2, 3] and not node.attributes.get_int("keepdims", 1):
            node.replace_input_with(0, self._last.get(given(node, 0), given(node, 0)))

    def _shape(self, node: ir.Node) -> None:
        """The sizes of a value channels last, in the order of channels first."""
        if self._reads_none(node):
            return
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 4)
        sizes = self._insert(node, "Shape", [self._last[given(node, 0)]])
        wanted = self._reordered(sizes, FIRST[start:end], node)
        node.outputs[0].replace_all_uses_with(wanted)

    def _transpose(self, node: ir.Node) -> None:
        made, source, order = node.outputs[0], given(node, 0), permutation(node)
        if order == FIRST:
            self._last[made] = source
        elif order == LAST and source in self._last and not made.is_graph_output():
            made.replace_all_uses_with(self._last[source])
        elif order == (0, 2, 1):
            self._flattened(node)

    def _flattened(self, node: ir.Node) -> None:
        """An image that is flattened to [B, C, H·W] and transposed is [B, H·W, C], which channels last already is."""
        flat = made_by(node.inputs[0], "Reshape")
        image = given(flat, 0) if flat else None
        channels = size(image, 1)
        if image is None or image not in self._last or channels is None or size(given(node, 0), 1) != channels:
            return
        made = self._insert(node, "Reshape", [self._last[image], self._sizes(node, (0, -1, channels))])
        self._keep_type(node.outputs[0], made)
        node.outputs[0].replace_all_uses_with(made)

    def _reshape(self, node: ir.Node) -> None:
        """The inverse: [B, H·W, C] that is transposed and becomes an image."""
        turned = made_by(node.inputs[0], "Transpose")
        if turned is None or permutation(turned) != (0, 2, 1) or rank(node.outputs[0]) != 4:
            return
        if size(node.outputs[0], 1) is None or size(node.inputs[0], 1) != size(node.outputs[0], 1):
            return
        if not node.attributes.get_int("allowzero", 0):  # a 0 would stand for the size at its place
            return
        shape = self._reordered(given(node, 1), LAST, node)
        self._replace(node, self._insert(node, "Reshape", [turned.inputs[0], shape], allowzero=1))

    def _reads_none(self, node: ir.Node) -> bool:
        """Whether it reads no value that there is channels last."""
        return not any(value in self._last for value in node.inputs)

    def _as_last(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """`value` [B, C, H, W] channels last, transposed here if need be."""
        if value not in self._last:
            self._last[value] = self._insert(before, "Transpose", [value], perm=LAST)
        return self._last[value]

    def _broadcast(self, value: ir.Value | None, before: ir.Node) -> ir.Value | None:
        """What broadcasts over an image channels last as `value` does over it channels first; None where unknown."""
        if value is None or value in self._last:
            return None if value is None else self._last[value]
        array = constant(value)
        if array is not None and array.size == 1:
            return value
        if array is not None:
            return self._constant(array.reshape((1,) * (4 - array.ndim) + array.shape).transpose(LAST), value)
        added = made_by(value, "Unsqueeze")
        axes = constant(added.inputs[1]) if added else None
        if added and axes is not None and axes.tolist() == [2, 3] and rank(value) == 4:
            return self._insert(before, "Unsqueeze", [added.inputs[0], self._sizes(before, (1, 2))])
        return self._as_last(value, before) if rank(value) == 4 else None

    def _reordered(self, value: ir.Value, order: tuple[int, ...], before: ir.Node) -> ir.Value:
        """The entries of `value`, one per axis, in another order."""
        array = constant(value)
        if array is not None:
            return self._constant(array[list(order)] if array.size else array, value)
        return self._insert(before, "Gather", [value, self._sizes(before, order)])

    def _sizes(self, near: ir.Node, values: tuple[int, ...]) -> ir.Value:
        return self._constant(int64(values), near.outputs[0])

    def _constant(self, array: Array, of: ir.Value) -> ir.Value:
        name = f"{of.name}.last.{len(self._graph.initializers)}"
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self._graph.initializers.add(value)
        return value

    def _insert(
        self, before: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], **attributes: int | Sequence[int]
    ) -> ir.Value:
        made = ir.node(op_type, inputs, attributes)
        self._graph.insert_before(before, made)
        return made.outputs[0]

    def _replace(self, node: ir.Node, last: ir.Value) -> None:
        """Let `last`, transposed to channels first, stand for what `node` computes."""
        old = node.outputs[0]
        first = self._insert(node, "Transpose", [last], perm=FIRST)
        self._keep_type(old, first)
        name = old.name
        old.replace_all_uses_with(first, replace_graph_outputs=True)
        old.name, first.name = f"{name}.plain", name
        self._last[first] = last

    def _keep_type(self, old: ir.Value, new: ir.Value) -> None:
        new.shape, new.type = old.shape, old.type


def _pads_itself(node: ir.Node) -> bool:
    return node.attributes.get_string("auto_pad", "NOTSET") not in {"NOTSET", ""}
