"""A graph of a model becomes its variant that applies LoRAs: nodes are added to the ONNX graph, and nothing is traced.

Layers are found by the names of their weights. What the torch module computes with the updates of `engines.export.lora`
is what the variant is checked against.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from engines.contract import TensorSpec
from engines.manifest import ComputeDtype, LoraLayer

_DTYPES: Mapping[ComputeDtype, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}


def add_updates(
    model: ir.Model, layers: Iterable[LoraLayer], *, inputs: Sequence[TensorSpec], computes_in: ComputeDtype
) -> None:
    """Add the inputs that `inputs` has beyond those of `model`, and the updates of every layer that it computes.

    Layers that read the same value are updated together: one gather and one product with their factors `down`.
    """
    graph = model.graph
    _add_inputs(graph, inputs)
    updates = _Updates(graph, computes_in)
    for group in _groups(graph, layers):
        updates.add(group)


class _Target(NamedTuple):
    """A layer, and the node that multiplies by its weights."""

    layer: LoraLayer
    node: ir.Node

    @property
    def given(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None  # noqa: S101 - the operator requires it
        return value

    @property
    def made(self) -> ir.Value:
        """The layer's output: behind the bias, where that is a node of its own."""
        product = self.node.outputs[0]
        users = [use.node for use in product.uses()]
        if self.node.op_type == "MatMul" and len(users) == 1 and _adds_vector(users[0]):
            return users[0].outputs[0]
        return product


def _adds_vector(node: ir.Node) -> bool:
    constants = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    return node.op_type == "Add" and any(len(constant.shape) == 1 for constant in constants)


def _groups(graph: ir.Graph, layers: Iterable[LoraLayer]) -> list[list[_Target]]:
    """The layers of the graph, in its order. Those of one module that read the same value are a group: Q, K and V."""
    named = {f"{layer.part}.{layer.name}.weight": layer for layer in layers}
    groups = defaultdict[tuple[ir.Value, str, str], list[_Target]](list)
    for node in graph:
        if node.op_type in ("MatMul", "Gemm", "Conv") and (layer := named.get(_weight(node))):
            target = _Target(layer, node)
            groups[target.given, layer.name.rpartition(".")[0], node.op_type].append(target)
    return list(groups.values())


def _weight(node: ir.Node) -> str:
    """The name of the weights that a node multiplies by, which may be stored in another type."""
    value = node.inputs[1]
    while value is not None and (source := value.producer()) is not None and source.op_type == "Cast":
        value = source.inputs[0]
    return str(value.name).removesuffix(".T") if value is not None else ""


def _add_inputs(graph: ir.Graph, specs: Sequence[TensorSpec]) -> None:
    known = {str(value.name): value for value in graph.inputs}
    wanted = [known.get(spec.name) or _input(spec) for spec in specs]
    graph.inputs.clear()
    graph.inputs.extend(wanted)


def _number(value: ir.Value, axis: int) -> int:
    size = value.shape[axis] if value.shape is not None else None
    assert isinstance(size, int)  # noqa: S101 - the port's dimension is fixed
    return size


def _input(spec: TensorSpec) -> ir.Value:
    dtype = ir.DataType.from_numpy(np.dtype(spec.dtype))
    return ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=ir.TensorType(dtype))


class _Updates:
    """Adds nodes to a graph. What several layers read is computed once, at its start.

    Weights of LoRAs scale `down` and not the product with it, so that a weight of 0 is 0 whatever x is, in FP16 too.
    """

    def __init__(self, graph: ir.Graph, computes_in: ComputeDtype) -> None:
        self._graph = graph
        self._dtype = _DTYPES[computes_in]
        self._numbers = count()
        self._first = graph[0]
        self._tables: dict[int, tuple[ir.Value, ir.Value]] = {}
        inputs = {str(value.name): value for value in graph.inputs}
        self._pool, self._index, weight = (inputs[name] for name in ("lora_pool", "row_lora", "lora_weight"))
        self._width = _number(self._pool, 1)  # G
        tape = Tape()
        self._weight = self._cast(tape, tape.op("Unsqueeze", [weight, self._ints(2)]), ir.DataType.FLOAT)  # [R, A, 1]
        self._insert(tape, before=self._first)

    def add(self, group: Sequence[_Target]) -> None:
        """Update the layers of a group, which read the same value."""
        first, tape = group[0], Tape()
        parts = [tape.op("MatMul", [self._rows(tape, first), self._down(tape, [target.layer for target in group])])]
        if len(group) > 1:
            split = {"axis": 2, "num_outputs": len(group)}
            parts = list(tape.op_multi_out("Split", parts, split, num_outputs=len(group)))
        self._insert(tape, before=first.node)
        for target, hidden in zip(group, parts, strict=True):  # hidden: [R, n, A]
            self._update(target, hidden)

    def _down(self, tape: Tape, layers: Sequence[LoraLayer]) -> ir.Value:
        """The weighted factors `down` of layers that read the same: [R, in, layers · A]."""
        width, several = layers[0].inputs, len(layers) > 1
        table, index = self._table(width)
        places, weight = self._ints(*(layer.down // width for layer in layers)), self._weight
        if several:
            index, weight = (tape.op("Unsqueeze", [value, self._ints(1)]) for value in (index, weight))
            places = tape.op("Unsqueeze", [places, self._ints(1)])  # [layers, 1]
        factors = tape.op("Mul", [self._gather(tape, table, tape.op("Add", [index, places])), weight])
        if several:
            factors = tape.op("Reshape", [factors, self._ints(0, -1, width)])
        return tape.op("Transpose", [factors], {"perm": (0, 2, 1)})

    def _update(self, target: _Target, hidden: ir.Value) -> None:
        tape, made, width = Tape(), target.made, target.layer.outputs
        users = [(use.node, use.idx) for use in made.uses()]
        table, index = self._table(width)
        up = self._gather(tape, table, tape.op("Add", [index, self._ints(target.layer.up // width)]))  # [R, A, out]
        update = self._as_made(tape, target, tape.op("MatMul", [hidden, up]))
        updated = tape.op("Add", [made, update])
        for node, position in users:
            if node not in tape.nodes:
                node.replace_input_with(position, updated)
        self._insert(tape, after=made.producer())

    def _rows(self, tape: Tape, target: _Target) -> ir.Value:
        """What a layer reads, as [R, n, in]."""
        if target.node.op_type == "Gemm":
            return tape.op("Unsqueeze", [target.given, self._ints(1)])
        if target.node.op_type == "Conv":
            return tape.op("Transpose", [tape.op("Reshape", [target.given, self._ints(0, 0, -1)])], {"perm": (0, 2, 1)})
        return target.given

    def _as_made(self, tape: Tape, target: _Target, update: ir.Value) -> ir.Value:
        """An update [R, n, out] in the shape of the layer's output."""
        if target.node.op_type == "Gemm":
            return tape.op("Squeeze", [update, self._ints(1)])
        if target.node.op_type == "Conv":
            first = tape.op("Transpose", [update], {"perm": (0, 2, 1)})
            image = tape.op("Reshape", [first, tape.op("Shape", [target.made])], {"allowzero": 1})
            # What cannot be inferred, and rewriting the graph channels last requires.
            image.type, image.shape = ir.TensorType(self._dtype), ir.Shape([None, target.layer.outputs, None, None])
            return image
        return update

    def _table(self, width: int) -> tuple[ir.Value, ir.Value]:
        """The pool as vectors of one width, and which of them are the first of each row's ranks: [R, A]."""
        if width not in self._tables:
            tape = Tape()
            table = tape.op("Reshape", [self._pool, self._ints(-1, width)])
            self._tables[width] = table, tape.op("Mul", [self._index, self._ints(self._width // width)])
            self._insert(tape, before=self._first)
        return self._tables[width]

    def _gather(self, tape: Tape, table: ir.Value, index: ir.Value) -> ir.Value:
        return self._cast(tape, tape.op("Gather", [table, index]), ir.DataType.FLOAT16)

    def _cast(self, tape: Tape, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value`, which has `dtype`, in the type that the graph computes in."""
        return value if dtype == self._dtype else tape.op("Cast", [value], {"to": self._dtype})

    def _insert(self, tape: Tape, *, before: ir.Node | None = None, after: ir.Node | None = None) -> None:
        """Add nodes, named: the graph would give them names that others have."""
        for node in tape.nodes:
            for value in node.outputs:
                value.name = f"lora_{next(self._numbers)}"
        if before is not None:
            self._graph.insert_before(before, tape.nodes)
        if after is not None:
            self._graph.insert_after(after, tape.nodes)

    def _ints(self, *values: int) -> ir.Value:
        """A constant vector; equal ones are one."""
        name = f"lora_ints_{'_'.join(map(str, values))}"
        if name not in self._graph.initializers:
            tensor = ir.tensor(np.array(values, np.int64), name=name)
            value = ir.Value(
                name=name, shape=ir.Shape((len(values),)), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.initializers.add(value)
        return self._graph.initializers[name]
