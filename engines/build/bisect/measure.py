"""Measures some tensors of an engine against the FP32 graph: both are marked, run by Polygraphy, and compared."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnx import ModifyOutputs, SaveOnnx
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, SimpleCompareFunc

from engines.backends.device import Device
from engines.build.bisect.finding import Reading
from engines.build.bisect.graph import Graph, quiet_polygraphy
from engines.contract import Array, Arrays

_MARK = "marked:"  # before the name of a marked tensor: an output in FP32, which numpy has and BF16 it has not
_MASK = 1e30  # values beyond it hide scores from a softmax, and are others in every type
_REFERENCE, _ENGINE = "FP32 in ONNX Runtime", "engine"

Ports = Mapping[str, tuple[tuple[int, ...], Any]]  # shape and dtype by name
Compile = Callable[[Path], Path]  # a marked ONNX graph to the file that the device loads


class MarkedEngine:
    """An engine that can be compiled anew with some tensors marked as outputs, and its FP32 graph."""

    def __init__(  # noqa: PLR0913 - what is compared, on what, how far
        self,
        graph: Graph,
        reference: Graph,
        counterparts: Mapping[str, str],
        *,
        device: Device,
        compile: Compile,
        inputs: Arrays,
        tolerance: float,
        tolerance_of_outputs: float,
    ) -> None:
        """`counterparts` names tensors of `graph` in `reference`. Tolerances are relative to the range."""
        self._graph = graph
        self._reference = reference
        self._counterparts = counterparts
        self._device = device
        self._compile = compile
        self._inputs = inputs
        self._tolerance = tolerance
        self._tolerance_of_outputs = tolerance_of_outputs

    def read(self, tensors: Sequence[str]) -> dict[str, Reading]:
        """The readings of `tensors`, and of all outputs of the graph. Raises EngineError."""
        marks = [name for name in tensors if name not in self._graph.outputs]
        with quiet_polygraphy(), np.errstate(all="ignore"):
            expected = self._run_reference(marks)
            computed = self._run_engine(marks, expected)
            return self._compared(expected, computed)

    def _run_reference(self, marks: Sequence[str]) -> Any:
        names = {name: self._counterparts[name] for name in marks}
        with _marked(self._reference, names, "reference") as path:
            runner = OnnxrtRunner(SessionFromOnnx(str(path), providers=["cpu"]), name=_REFERENCE)
            return Comparator.run([runner], data_loader=[self._inputs])

    def _run_engine(self, marks: Sequence[str], expected: Any) -> Any:
        shapes = {name: array.shape for name, array in expected[_REFERENCE][0].items()}
        dtypes = {name: self._graph.outputs.get(name, np.float32) for name in shapes}
        outputs = {name: (shape, dtypes[name]) for name, shape in shapes.items()}
        with _marked(self._graph, {name: name for name in marks}, "engine") as path:
            inputs = {name: (array.shape, self._graph.inputs[name]) for name, array in self._inputs.items()}
            runner = DeviceRunner(self._device, self._compile(path), inputs, outputs)
            return Comparator.run([runner], data_loader=[self._inputs])

    def _compared(self, expected: Any, computed: Any) -> dict[str, Reading]:
        wanted, found = expected[_REFERENCE][0], computed[_ENGINE][0]
        for name in wanted:
            wanted[name], found[name] = _without_masks(wanted[name], found[name])
        sizes = {name: _largest(array) for name, array in wanted.items()}
        allowed = {name: size * self._allowed(name) for name, size in sizes.items()}
        expected.extend(computed)
        compare = SimpleCompareFunc(atol=allowed, rtol=0.0, check_error_stat="max")
        ((_, (results,)),) = Comparator.compare_accuracy(expected, compare_func=compare)[0].items()
        return {
            name.removeprefix(_MARK): Reading(
                error=float(result.max_absdiff),
                expected=sizes[name],
                computed=_largest(found[name]),
                passed=bool(result),
            )
            for name, result in results.items()
        }

    def _allowed(self, name: str) -> float:
        return self._tolerance_of_outputs if name in self._graph.outputs else self._tolerance


class DeviceRunner(BaseRunner):  # type: ignore[misc] # it ships no types
    """A marked engine on one of our devices, for Polygraphy."""

    def __init__(self, device: Device, path: Path, inputs: Ports, outputs: Ports) -> None:
        super().__init__(name=_ENGINE)
        self._device, self._path, self._inputs, self._outputs = device, path, inputs, outputs

    def activate_impl(self) -> None:
        self._stream = self._device.stream("bisect", urgent=True)
        self._engine = self._device.load(self._path, self._stream)

    def get_input_metadata_impl(self) -> Any:
        metadata = TensorMetadata()
        for name, (shape, dtype) in self._inputs.items():
            metadata.add(name, dtype=dtype, shape=shape)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        began = time.monotonic()
        bound = {name: self._device.allocate(*port) for name, port in self._inputs.items()}
        outputs = {name: self._device.allocate(*port) for name, port in self._outputs.items()}
        for name, array in feed_dict.items():
            self._stream.write(bound[name], array)
        self._engine.bind({**bound, **outputs}).launch()
        found = {name: self._stream.read(buffer).result() for name, buffer in outputs.items()}
        self.inference_time = time.monotonic() - began
        return found

    def deactivate_impl(self) -> None:
        del self._engine, self._stream


@contextmanager
def _marked(graph: Graph, marks: Mapping[str, str], role: str) -> Iterator[Path]:
    """The graph with the tensors in the values of `marks` as outputs in FP32, by the names in its keys, in a file.

    The file lies next to the graph's own, where the relative paths of weights hold, and is removed at the end.
    """
    path = graph.path.with_name(f".{graph.path.stem}.{role}.{os.getpid()}.onnx")
    names = [*graph.outputs, *(_MARK + name for name in marks)]
    try:
        SaveOnnx(ModifyOutputs(_with_casts(graph, marks), outputs=names), str(path))()
        yield path
    finally:
        path.unlink(missing_ok=True)


def _with_casts(graph: Graph, marks: Mapping[str, str]) -> Any:
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for name, tensor in marks.items():
        model.graph.node.append(onnx.helper.make_node("Cast", [tensor], [_MARK + name], to=onnx.TensorProto.FLOAT))
        value = onnx.helper.make_tensor_value_info(_MARK + name, onnx.TensorProto.FLOAT, None)
        model.graph.value_info.append(value)
    model.graph.value_info.extend(model.graph.output)  # where ModifyOutputs looks for the types of outputs
    return model


def _without_masks(wanted: Array, found: Array) -> tuple[Array, Array]:
    """Both with zeros where both hide a score."""
    if not np.issubdtype(wanted.dtype, np.floating):
        return wanted, found
    hidden = (np.abs(wanted) >= _MASK) & (
        (np.abs(found) >= np.finfo(np.float16).max) & (np.sign(wanted) == np.sign(found))
    )
    return np.where(hidden, 0, wanted), np.where(hidden, 0, found)


def _largest(array: Array) -> float:
    return float(np.abs(np.asarray(array, np.float64)).max(initial=0))
