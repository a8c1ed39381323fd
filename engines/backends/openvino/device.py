"""OpenVINO on the CPU, from the same ONNX graphs. Engines read and write the bound arrays in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from engines.backends import cores
from engines.backends.device import Buffer, Reader, Stream
from engines.backends.host import GraphPort, HostDevice, HostStream, bound_arrays
from engines.backends.mapped import release_pages
from engines.backends.openvino.package import openvino
from engines.backends.openvino.upsampling import at_low_resolution
from engines.contract import Array
from engines.errors import EngineError

# By default OpenVINO computes everything in BF16 on processors that have it, the scheduler's tables included. This hint
# leaves the graph's own precisions as they are.
_IN_FP32 = {"INFERENCE_PRECISION_HINT": "f32"}
TAKES_BF16 = ["latentd", "takes_bf16"]  # in graphs that mark the nodes that have to stay FP32
# Bytes of weights up to which a graph of steps is compiled for its commonest shape too. In INT8 the shallow step of
# SD 1.x has 8 million, and the full one of a small model 579; in FP32 four times as many.
_FEW_WEIGHTS = 2**24

_Shapes = Sequence[tuple[int, ...]]
_Compile = Callable[[openvino.Model], openvino.CompiledModel]


class _Weights:
    """A graph's weights: those in its folder, and those that were made of them when it was loaded."""

    def __init__(self, graph: Path, core: openvino.Core) -> None:
        self._folders = [graph.parent]
        self._core = core

    def constant(self, values: Array) -> openvino.Node:
        """A constant that OpenVINO maps from a file without a name; where none can be written, one in memory.

        OpenVINO would release memory that it shares with Python in a thread of its own, as late as at the end.
        """
        made = openvino.opset13.constant(values)
        with suppress(OSError, RuntimeError), TemporaryDirectory(prefix="latentd-") as folder:
            path = Path(folder).resolve() / "kernel.xml"
            openvino.save_model(openvino.Model([openvino.opset13.result(made)], []), path, compress_to_fp16=False)
            (result,) = self._core.read_model(path).get_results()
            made = result.input_value(0).get_node()
            self._folders.append(path.parent)  # which is removed: the mapping keeps what was in it
        return made

    def release_pages(self) -> None:
        for folder in self._folders:
            release_pages(folder)


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


class _Compiled:
    """A graph compiled for any shapes and, where its weights are few, once more for the first that are bound.

    Of known shapes OpenVINO makes fewer and faster kernels. But no two compiled models share the weights that they
    have repacked for their kernels.
    """

    def __init__(self, model: openvino.Model, compile_model: _Compile, *, is_small: bool) -> None:
        self._compile = compile_model
        self._any = compile_model(model)
        self._model = model if is_small else None
        self._first: _Shapes | None = None

    def request(self, shapes: _Shapes) -> openvino.InferRequest:
        """An inference request for inputs of these shapes, in order. Raises RuntimeError."""
        if self._model and self._first is None:
            own = self._model.clone()
            own.reshape(dict(enumerate(map(openvino.PartialShape, shapes))))
            self._own, self._first = self._compile(own), shapes
        return (self._own if shapes == self._first else self._any).create_infer_request()


class OpenVinoEngine:
    """An ONNX graph compiled by OpenVINO.

    Port names come from the graph before compilation: on processors without BF16, compiling drops casts at the end of a
    graph and the names of its outputs with them, but keeps the order.
    """

    def __init__(self, read: openvino.Model, compiled: _Compiled, *, graph: str, weights: _Weights) -> None:
        """`graph` is the name for messages."""
        self._compiled, self._weights, self._graph = compiled, weights, graph
        self._inputs = {port.any_name: _port(port) for port in read.inputs}
        self._outputs = {port.any_name: _port(port) for port in read.outputs}

    def bind(self, buffers: Mapping[str, Buffer]) -> OpenVinoCall:
        arrays = bound_arrays(buffers, self._inputs | self._outputs, self._graph)
        inputs, outputs = ([arrays[name] for name in names] for names in (self._inputs, self._outputs))
        try:
            request = self._compiled.request([array.shape for array in inputs])
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot compile {self._graph} for these shapes: {error}") from error
        return OpenVinoCall(request, inputs, outputs, weights=self._weights)


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
        stream: Stream,
        *,
        read: Reader = Path.read_bytes,  # noqa: ARG002 - OpenVINO finds weights only beside a graph that it opens
    ) -> OpenVinoEngine:
        weights = _Weights(path, self._core)
        of_steps = isinstance(stream, HostStream) and stream.urgent
        try:
            model = at_low_resolution(self._core.read_model(path), weights.constant)
            options = self._options | ({} if model.has_rt_info(TAKES_BF16) else _IN_FP32)
            compiled = _Compiled(
                model,
                lambda one: self._core.compile_model(one, "CPU", options),
                is_small=of_steps and _weights_of(model) <= _FEW_WEIGHTS,
            )
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot load {path}: {error}") from error
        weights.release_pages()
        return OpenVinoEngine(model, compiled, graph=path.name, weights=weights)


def _weights_of(model: openvino.Model) -> int:
    """Bytes of its constants."""
    return sum(node.get_byte_size() for node in model.get_ops() if node.get_type_name() == "Constant")


def open_device(*, threads: int) -> OpenVinoDevice:
    return OpenVinoDevice(threads=threads)
