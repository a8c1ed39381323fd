"""OpenVINO on the CPU, from the same ONNX graphs. Engines read and write the bound arrays in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from engines.backends import cores
from engines.backends.device import Buffer, Reader, Stream
from engines.backends.host import GraphPort, HostDevice, bound_arrays
from engines.backends.mapped import FileArrays, release_pages
from engines.backends.openvino_package import openvino as openvino  # noqa: PLC0414 - the build imports it from here
from engines.backends.openvino_upsampling import at_low_resolution
from engines.contract import Array
from engines.errors import EngineError

# By default OpenVINO computes everything in BF16 on processors that have it, the scheduler's tables included. This hint
# leaves the graph's own precisions as they are.
_IN_FP32 = {"INFERENCE_PRECISION_HINT": "f32"}
TAKES_BF16 = ["latentd", "takes_bf16"]  # in graphs that mark the nodes that have to stay FP32


class _Weights:
    """A graph's weights: those in its folder, and those that were made of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = FileArrays()

    def constant(self, values: Array) -> openvino.Node:
        return openvino.op.Constant(self._made.copy(values), shared_memory=True)

    def release_pages(self) -> None:
        release_pages(self._folder)
        self._made.release_pages()


class OpenVinoCall:
    """One inference request over bound arrays, which it keeps alive."""

    def __init__(
        self, request: openvino.InferRequest, inputs: Sequence[Array], outputs: Sequence[Array], *, weights: _Weights
    ) -> None:
        self._request = request
        self._weights = weights
        self._has_run = False
        self._arrays = inputs, outputs
        for place, array in enumerate(inputs):
            request.set_input_tensor(place, openvino.Tensor(array, shared_memory=True))
        for place, array in enumerate(outputs):
            request.set_output_tensor(place, openvino.Tensor(array, shared_memory=True))

    def launch(self) -> None:
        try:
            self._request.infer()
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed in a step: {error}") from error
        if not self._has_run:  # the first run copied all weights into the layout that its kernels use
            self._weights.release_pages()
            self._has_run = True


def _port(port: openvino.Output) -> GraphPort:
    sizes = port.get_partial_shape()
    return GraphPort(
        port.get_element_type().to_dtype().name, tuple(size.get_length() if size.is_static else None for size in sizes)
    )


class OpenVinoEngine:
    """An ONNX graph compiled by OpenVINO.

    Port names come from the graph before compilation: on processors without BF16, compiling drops casts at the end of a
    graph and the names of its outputs with them, but keeps the order.
    """

    def __init__(
        self, read: openvino.Model, compiled: openvino.CompiledModel, *, graph: str, weights: _Weights
    ) -> None:
        """`graph` is the name for messages."""
        self._compiled, self._weights, self._graph = compiled, weights, graph
        self._inputs = {port.any_name: _port(port) for port in read.inputs}
        self._outputs = {port.any_name: _port(port) for port in read.outputs}

    def bind(self, buffers: Mapping[str, Buffer]) -> OpenVinoCall:
        arrays = bound_arrays(buffers, self._inputs | self._outputs, self._graph)
        inputs, outputs = ([arrays[name] for name in names] for names in (self._inputs, self._outputs))
        return OpenVinoCall(self._compiled.create_infer_request(), inputs, outputs, weights=self._weights)


class OpenVinoDevice(HostDevice):
    """This machine's processor, with ONNX graphs in OpenVINO."""

    def __init__(self, *, threads: int) -> None:
        super().__init__()
        self.name = f"cpu, OpenVINO {openvino.__version__}"
        self._core = openvino.Core()
        self._options = {"PERFORMANCE_HINT": "LATENCY"}
        if threads := threads or cores.limit():
            self._options["INFERENCE_NUM_THREADS"] = str(threads)

    def load(
        self,
        path: Path,
        stream: Stream,  # noqa: ARG002 - the host's streams are all alike
        *,
        read: Reader = Path.read_bytes,  # noqa: ARG002 - OpenVINO finds weights only beside a graph that it opens
    ) -> OpenVinoEngine:
        weights = _Weights(path.parent)
        try:
            model = at_low_resolution(self._core.read_model(path), weights.constant)
            options = self._options | ({} if model.has_rt_info(TAKES_BF16) else _IN_FP32)
            compiled = self._core.compile_model(model, "CPU", options)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot load {path}: {error}") from error
        weights.release_pages()
        return OpenVinoEngine(model, compiled, graph=path.name, weights=weights)


def open_device(*, threads: int) -> OpenVinoDevice:
    return OpenVinoDevice(threads=threads)
