"""An OpenVINO model in parts, each of which is compiled and changed alone, and put together again.

Compiling a model widens its weights to FP32 and packs them for its kernels: eight bytes and more for each.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from engines.backends.openvino.package import openvino
from engines.contract import Array

Model = Any  # an openvino.Model, which ships no types
_Node = Any
_Output = Any  # of a node
_Key = str  # of an output that crosses a cut
_IN_FP32 = {"INFERENCE_PRECISION_HINT": "f32"}


class Samples:
    """The inputs of one part by name for each call of a recording, read from files."""

    def __init__(self, folder: Path, names: Iterable[_Key], *, count: int) -> None:
        self._folder, self._names, self._count = folder, tuple(names), count

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for call in range(self._count):
            yield {name: np.load(_file(self._folder, name, call)) for name in self._names}


def _file(folder: Path, name: _Key, call: int) -> Path:
    return folder / f"{name}.{call}.npy"


Change = Callable[[Model, Iterable[Mapping[str, Array]]], Model]  # of a model, by samples of its inputs by name


def change_in_parts(
    model: Model, change: Change, recording: Sequence[Mapping[str, Array]], *, max_weights: int, folder: Path
) -> Model:
    """`model`, which is taken apart, with `change` applied to parts of `max_weights` weights, or of one layer.

    A model of fewer is changed as it is. Each part is changed on what the unchanged parts before it compute from
    `recording`. Those tensors lie in `folder` while they are needed. A changed part has its inputs and outputs in the
    same order.

    Raises:
        RuntimeError: a part cannot be compiled or run.
        OSError: there is no room in `folder`.
    """
    flow = _Flow(model)
    spans = flow.spans(max_weights)
    if len(spans) < 2:
        return change(model, recording)
    with TemporaryDirectory(prefix=".calibration-", dir=folder) as temporary:
        return _changed(flow, flow.take_apart(spans), change, recording, Path(temporary))


@dataclass(frozen=True, slots=True)
class _Part:
    model: Model
    inputs: tuple[_Key, ...]
    outputs: tuple[_Key, ...]


def _changed(
    flow: _Flow, parts: Sequence[_Part], change: Change, recording: Sequence[Mapping[str, Array]], folder: Path
) -> Model:
    last = {key: number for number, part in enumerate(parts) for key in part.inputs}
    outputs = {_key(parameter.output(0)): parameter.output(0) for parameter in flow.parameters}
    for call, inputs in enumerate(recording):
        for key, output in outputs.items():
            np.save(_file(folder, key, call), inputs[output.any_name])
    for number, part in enumerate(parts):
        samples = Samples(folder, part.inputs, count=len(recording))
        if not last.keys().isdisjoint(part.outputs):
            _compute(part, samples, folder)
        outputs |= _attached(part, change(part.model, samples), outputs)
        for key in part.inputs:
            if last[key] == number:
                _remove(folder, key)
    return flow.ending_in(outputs)


def _compute(part: _Part, samples: Samples, folder: Path) -> None:
    """Write the outputs of `part` for each of `samples`."""
    request = openvino.Core().compile_model(part.model, "CPU", _IN_FP32).create_infer_request()
    for call, inputs in enumerate(samples):
        computed = request.infer(inputs)
        for place, key in enumerate(part.outputs):
            np.save(_file(folder, key, call), computed[place])


def _attached(part: _Part, changed: Model, outputs: Mapping[_Key, _Output]) -> dict[_Key, _Output]:
    """The outputs of a changed part, which now reads `outputs` in place of its inputs."""
    for parameter, key in zip(changed.get_parameters(), part.inputs, strict=True):
        for port in parameter.output(0).get_target_inputs():
            port.replace_source_output(outputs[key])
    results = changed.get_results()
    return {key: result.input_value(0) for key, result in zip(part.outputs, results, strict=True)}


def _remove(folder: Path, key: _Key) -> None:
    for file in folder.glob(f"{key}.*.npy"):
        file.unlink()


class _Flow:
    """The nodes of a model that compute something from its inputs, in the order in which they run."""

    def __init__(self, model: Model) -> None:
        self.parameters, self._results = model.get_parameters(), model.get_results()
        self._name = model.get_friendly_name()
        self._nodes = list[_Node]()
        self._place = dict.fromkeys((node.get_name() for node in self.parameters), -1)  # by a node's unique name
        self._weights = list[int]()  # of each node, which it alone reads
        constant = dict[str, int]()  # sizes of nodes that compute nothing from the inputs
        for node in model.get_ordered_ops():
            sources = [source.get_node().get_name() for source in _sources(node)]
            weights = sum(constant.get(name, 0) for name in sources)
            if node.get_type_name() == "Constant":
                constant[node.get_name()] = prod(node.get_output_shape(0))
            elif self._place.keys().isdisjoint(sources):
                constant[node.get_name()] = weights
            elif node.get_type_name() != "Result":
                self._place[node.get_name()] = len(self._nodes)
                self._nodes.append(node)
                self._weights.append(weights)
        self._ends = [_key(result.input_value(0)) for result in self._results]
        self._last = self._last_readers()

    def _last_readers(self) -> dict[_Key, int]:
        """The place of the last node that reads each output; behind all nodes where the model returns it."""
        places = {_key(source): place for place, node in enumerate(self._nodes) for source in self._moving(node)}
        return places | dict.fromkeys(self._ends, len(self._nodes))

    def _moving(self, node: _Node) -> list[_Output]:
        """The outputs that `node` reads, without constants."""
        return [source for source in _sources(node) if source.get_node().get_name() in self._place]

    def spans(self, max_weights: int) -> list[range]:
        """The places of each part's nodes: cut where the fewest tensors cross."""
        sums, crossing = [0, *accumulate(self._weights)], self._crossing()
        spans, begin = list[range](), 0
        while sums[-1] - sums[begin] > max_weights:
            possible = range(begin + 1, bisect_right(sums, sums[begin] + max_weights))
            late = [end for end in possible if sums[end] - sums[begin] >= max_weights / 2]
            end = min(late or possible[-1:] or [begin + 1], key=lambda place: (crossing[place], -place))
            spans.append(range(begin, end))
            begin = end
        return [*spans, range(begin, len(self._nodes))]

    def _crossing(self) -> list[int]:
        """How many tensors cross a cut before each node."""
        changes = [0] * (len(self._nodes) + 2)
        for node in self._nodes:
            begin = self._place[node.get_name()]
            for output in node.outputs():
                changes[begin + 1] += 1
                changes[self._last.get(_key(output), begin) + 1] -= 1
        return list(accumulate(changes))

    def take_apart(self, spans: Sequence[range]) -> list[_Part]:
        """A model of the nodes in each span; this one falls apart."""
        return [self._part(span) for span in spans]

    def _part(self, span: range) -> _Part:
        nodes = [self._nodes[place] for place in span]
        ending = [
            output for node in nodes for output in node.outputs() if self._last.get(_key(output), -1) >= span.stop
        ]
        inputs = dict[_Key, _Node]()
        for port in (port for node in nodes for port in node.inputs()):
            source = port.get_source_output()
            place = self._place.get(source.get_node().get_name())
            if place is not None and place not in span:
                if (key := _key(source)) not in inputs:
                    inputs[key] = _parameter(source)
                port.replace_source_output(inputs[key].output(0))
        model = openvino.Model([openvino.opset13.result(output) for output in ending], [*inputs.values()])
        # A copy, which shares the weights: NNCF follows outputs to their readers, and would leave the part.
        return _Part(model.clone(), tuple(inputs), tuple(map(_key, ending)))

    def ending_in(self, outputs: Mapping[_Key, _Output]) -> Model:
        """The model put together again: it returns `outputs`."""
        for result, key in zip(self._results, self._ends, strict=True):
            if key in outputs:
                result.input(0).replace_source_output(outputs[key])
        return openvino.Model(self._results, self.parameters, self._name)


def _sources(node: _Node) -> list[_Output]:
    return [port.get_source_output() for port in node.inputs()]


def _key(output: _Output) -> _Key:
    return f"{output.get_node().get_name()}.{output.get_index()}"


def _parameter(output: _Output) -> _Node:
    """An input of a part in place of `output`, named by its key."""
    parameter = openvino.opset13.parameter(output.get_partial_shape(), output.get_element_type(), name=_key(output))
    parameter.output(0).tensor.set_names({_key(output)})
    return parameter
