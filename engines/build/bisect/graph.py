"""What a bisection knows of an ONNX graph: its tensors in topological order, and what of another graph they are."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
from polygraphy.backend.onnx import OnnxFromPath
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from engines.build.bisect.finding import Place
from engines.contract import Array
from engines.errors import EngineError

# Nodes that pass a value on, in another type: graphs of several precisions differ by them.
_PASSING = {"Cast", "CastLike", "Identity", "QuantizeLinear", "DequantizeLinear"}
_NUMBERED = re.compile(r"val_\d+")
_FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
}


class Graph:
    """An ONNX graph without its weights, which may be large."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with quiet_polygraphy():
            self.model: Any = OnnxFromPath(str(path), ignore_external_data=True)()
        self.nodes: list[Any] = list(self.model.graph.node)  # in topological order, as ONNX requires
        self.inputs, self.outputs = _dtypes(self.model.graph.input), _dtypes(self.model.graph.output)
        self._weights = {weight.name: weight for weight in self.model.graph.initializer}
        self._types = _types(self.model)
        self._varying = self._find_varying()

    def tensors(self) -> Iterator[str]:
        """The tensors that can be compared, in topological order: floating point, and no constants. Also outputs."""
        for node in self.nodes:
            for name in node.output:
                if name in self.outputs or (name in self._varying and self.is_float(name)):
                    yield name

    def is_float(self, tensor: str) -> bool:
        return self._types.get(tensor, onnx.TensorProto.FLOAT) in _FLOATS  # rewritten graphs know not all

    def ancestors(self, tensors: Iterable[str]) -> dict[str, int]:
        """For each of `tensors`, in topological order, those among them that lead to it: bit n is the nth of them."""
        wanted = set(tensors)
        sets: dict[str, int] = {}
        found: dict[str, int] = {}
        for node in self.nodes:
            inherited = 0
            for name in node.input:
                inherited |= sets.get(name, 0)
            for name in node.output:
                sets[name] = inherited | (1 << len(found) if name in wanted else 0)
                if name in wanted:
                    found[name] = sets[name]
        return found

    def places(self) -> dict[str, Place]:
        """Where each tensor is computed."""
        scope, places = "the inputs", dict[str, Place]()
        constants: dict[str, str] = {name: name for name in self._weights if "." in name}
        for node in self.nodes:
            named = [constants[name] for name in node.input if name in constants]
            if node.output[0] not in self._varying:  # a cast or a transposition of weights
                constants.update(dict.fromkeys(node.output, named[0]) if named else {})
                continue
            scope = _module_of(named[0]) if named else scope
            shown = scope if named else f"after {scope}"
            places |= {name: Place(name, node.name, node.op_type, shown) for name in node.output}
        return places

    def around(self, tensor: str, among: Iterable[str]) -> list[str]:
        """`tensor` with what it is computed from and what is computed from it, as far as they are `among` these."""
        known, near = set(among), {tensor}
        for node in self.nodes:
            if tensor in node.output:
                near |= set(node.input)
            elif tensor in node.input:
                near |= set(node.output)
        return [name for node in self.nodes for name in node.output if name in near & known]

    def counterparts(self, other: Graph) -> dict[str, str]:
        """The tensors of this graph that `other` computes as well, in whatever type, each with its name there."""
        theirs = other._by_formula()
        mine: dict[str, list[str]] = defaultdict(list)
        found = {name: name for name in self.inputs}
        formulas = self._formulas()
        for node in self.nodes:
            if node.op_type in _PASSING:
                if node.input[0] in found:
                    found[node.output[0]] = found[node.input[0]]
                continue
            for name in node.output:
                same = mine[formulas[name]]
                if len(same) < len(theirs.get(formulas[name], ())):
                    found[name] = theirs[formulas[name]][len(same)]
                same.append(name)
        return found | {name: name for name in self.outputs if name in other.outputs}

    def _by_formula(self) -> Mapping[str, list[str]]:
        formulas, tensors = self._formulas(), defaultdict[str, list[str]](list)
        for node in self.nodes:
            if node.op_type not in _PASSING:
                for name in node.output:
                    tensors[formulas[name]].append(name)
        return tensors

    def _formulas(self) -> dict[str, str]:
        """What each tensor is computed from, as a hash: operators, attributes, weights by name, inputs by name."""
        formulas = {name: f"input {name}" for name in self.inputs}
        formulas |= {name: _formula_of_weight(weight) for name, weight in self._weights.items()}
        for node in self.nodes:
            inputs = [formulas.get(name, "") for name in node.input]
            if node.op_type in _PASSING:
                formulas[node.output[0]] = inputs[0]
                continue
            attributes = sorted((one.name, one.i, tuple(one.ints)) for one in node.attribute)
            for number, name in enumerate(node.output):
                formulas[name] = _hash(repr((node.op_type, attributes, inputs, number)))
        return formulas

    def _find_varying(self) -> set[str]:
        varying = set(self.inputs)
        for node in self.nodes:
            values = node.input[:1] if node.op_type in _PASSING else node.input  # the second of CastLike is a type
            if not varying.isdisjoint(values):
                varying |= set(node.output)
        return varying


def matched(graph: Graph, exported: Graph, reference: Graph) -> dict[str, str]:
    """The tensors of `graph` that `reference` computes as well, each with its name there.

    Where `graph` was rewritten after it was `exported`, formulas differ behind the first rewritten node. What kept its
    name and its operator is the same there, unless tools gave it that name: they number what has none.
    """
    found = graph.counterparts(reference)
    if graph.path == exported.path:
        return found
    known, here, there = exported.counterparts(reference), graph.places(), exported.places()
    kept = (
        name
        for name in here.keys() & there.keys() & known.keys()
        if here[name].operator == there[name].operator and not _NUMBERED.fullmatch(name)
    )
    return {name: known[name] for name in kept} | found


def _dtypes(ports: Iterable[Any]) -> dict[str, Any]:
    """numpy's dtype of each input or output."""
    return {port.name: onnx.helper.tensor_dtype_to_np_dtype(port.type.tensor_type.elem_type) for port in ports}


def _types(model: Any) -> dict[str, int]:
    """The type of each tensor, as far as the graph says or ONNX can infer it."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    known = (*inferred.value_info, *model.graph.value_info, *model.graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in known}


def _formula_of_weight(weight: Any) -> str:
    """The weight's name, if the checkpoint gave it; of constants their shape, and the values of small whole numbers."""
    if "." in weight.name:
        return f"weight {weight.name}"
    return f"constant {list(weight.dims)} {_whole_numbers(weight)}"


def _whole_numbers(weight: Any) -> list[int]:
    if weight.data_type != onnx.TensorProto.INT64 or weight.data_location == onnx.TensorProto.EXTERNAL:
        return []
    values: Array = onnx.numpy_helper.to_array(weight)
    return [int(value) for value in values.ravel()[:64]]


def _module_of(weight: str) -> str:
    return weight.removesuffix(".T").rpartition(".")[0]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Polygraphy without its log, and with its errors as ours."""
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            yield
    except PolygraphyException as error:
        raise EngineError(f"Polygraphy cannot compare the graphs: {error}") from error
