"""Engines of TensorRT, and their calls over bound memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engines.backends.cuda import (
    CapturedCalls,
    Cuda,
    CudaGraph,
    CudaStream,
    DeviceBuffer,
    GraphCapture,
    as_device_buffer,
)
from engines.backends.device import Buffer
from engines.backends.tensorrt.log import require
from engines.errors import DeviceLost, EngineError

_Shape = tuple[int, ...]
_Ranges = Mapping[str, tuple[_Shape, _Shape]]  # smallest and largest shape of each input


class Contexts:
    """Creates the execution contexts of one engine. TensorRT for RTX overrides this."""

    def __init__(self, engine: Any, path: Path, *, trt: Any) -> None:
        self.engine = engine
        self.path = path
        self._trt = trt

    def create(self) -> Any:
        """An execution context without scratch memory, which the caller assigns; None if TensorRT failed."""
        return self.engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def capturable(self, context: Any, stream: CudaStream) -> bool:  # noqa: ARG002 - TensorRT cannot say in advance
        """Whether to try capturing the context's work on `stream` as a CUDA graph."""
        return True

    def end_warm_up(self) -> None:
        """There is nothing to save for the next start."""


class Scratch:
    """The scratch memory of one stream. Its calls share it, because they run one after the other."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._size = 1  # at least a byte: a context needs a valid address
        self._memory: DeviceBuffer | None = None

    def reserve(self, size: int) -> None:
        """Make the next `memory` return at least `size` bytes."""
        self._size = max(self._size, size)

    def memory(self) -> DeviceBuffer:
        """At least the reserved size. Earlier calls keep the smaller memory they were given. Raises EngineError."""
        if self._memory is None or self._memory.nbytes < self._size:
            self._memory = self._cuda.allocate((self._size,), np.uint8, purpose="scratch")
        return self._memory


class TensorRtCall:
    """An execution context with its shapes and addresses set. Keeps the memory that the context points to alive."""

    def __init__(
        self,
        context: Any,
        memory: tuple[DeviceBuffer, ...],
        *,
        stream: CudaStream,
        contexts: Contexts,
        capture: GraphCapture,
        log: Any,
    ) -> None:
        self._context = context
        self._memory = memory
        self._stream = stream
        self._contexts = contexts
        self._capture = capture
        self._log = log
        self._graph: CudaGraph | None = None
        self._ran = False
        stream.finish_before(self, context)  # TensorRT needs the context until its work is done

    def launch(self) -> None:
        """Enqueue the work: the first time kernel by kernel, from the second time on as one CUDA graph.

        In the first launch TensorRT allocates and compiles, which a capture does not allow.
        """
        if self._ran and self._capture.wanted and self._graph is None:
            self._graph = self._try_capture()
        if self._graph is None:
            self._run()
        else:
            self._graph.launch()

    def _run(self) -> None:
        try:
            self._enqueue()
        except EngineError:
            self._stream.check_alive()  # on a lost device TensorRT fails in the same way
            raise
        self._ran = True

    def _try_capture(self) -> CudaGraph | None:
        """The graph, or None if capturing failed. TensorRT's auxiliary streams fork from and join it by events."""
        if not self._contexts.capturable(self._context, self._stream):
            self._capture.give_up("TensorRT reports that it cannot be captured.")
            return None
        try:
            return self._stream.capture(self._enqueue, keep=(self._context, self._memory))
        except DeviceLost:
            raise
        except EngineError as error:
            self._capture.failed(str(error))
            return None

    def _enqueue(self) -> None:
        require(self._context.execute_async_v3(self._stream.handle), "run a step", self._log)


class TensorRtEngine:
    """A deserialised engine for one stream, whose scratch memory its calls share."""

    def __init__(
        self,
        contexts: Contexts,
        *,
        trt: Any,
        stream: CudaStream,
        scratch: Scratch,
        captured: CapturedCalls,
        log: Any,
    ) -> None:
        self._engine = engine = contexts.engine
        self._name = contexts.path.name
        self._trt = trt
        self._stream = stream
        self._scratch = scratch
        self._contexts = contexts
        self._log = log
        self._captured = captured
        self._dtypes = self._read_dtypes()
        self._inputs = [one for one in self._dtypes if engine.get_tensor_mode(one) == trt.TensorIOMode.INPUT]
        self._profiles = [self._read_profile(index) for index in range(engine.num_optimization_profiles)]
        scratch.reserve(engine.device_memory_size_v2)

    def bind(self, buffers: Mapping[str, Buffer]) -> TensorRtCall:
        """Create an execution context for `buffers`, with the first optimization profile that covers their shapes."""
        memory = self._checked(buffers)
        shapes = {name: memory[name].shape for name in self._inputs}
        context = self._context_in(self._profile_for(shapes))
        self._set_shapes(context, memory)
        scratch = self._scratch.memory()
        context.set_device_memory(scratch.address, scratch.nbytes)
        for name, buffer in memory.items():
            require(context.set_tensor_address(name, buffer.address), f"set the address of {name}", self._log)
        return TensorRtCall(
            context,
            (*memory.values(), scratch),
            stream=self._stream,
            contexts=self._contexts,
            capture=self._captured.bound(shapes),
            log=self._log,
        )

    def _read_dtypes(self) -> dict[str, np.dtype[Any]]:
        """The dtype of every input and output by name, in the engine's order."""
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        return {name: self._read_dtype(name) for name in names}

    def _read_dtype(self, name: str) -> np.dtype[Any]:
        dtype = self._engine.get_tensor_dtype(name)
        try:
            numpy_type: np.dtype[Any] = np.dtype(self._trt.nptype(dtype))
        except TypeError as error:
            raise EngineError(
                f"{self._name}: {name} is {dtype}, which numpy does not support: export it as float32."
            ) from error
        return numpy_type

    def _read_profile(self, index: int) -> _Ranges:
        ranges = {name: self._engine.get_tensor_profile_shape(name, index) for name in self._inputs}
        return {name: (tuple(smallest), tuple(largest)) for name, (smallest, _optimal, largest) in ranges.items()}

    def _checked(self, buffers: Mapping[str, Buffer]) -> dict[str, DeviceBuffer]:
        """`buffers` as GPU memory. Raises EngineError unless their names and dtypes are those of the graph."""
        if self._dtypes.keys() != buffers.keys():
            raise EngineError(f"{self._name} takes {sorted(self._dtypes)}, was given {sorted(buffers)}.")
        return {name: self._checked_one(name, buffer) for name, buffer in buffers.items()}

    def _checked_one(self, name: str, buffer: Buffer) -> DeviceBuffer:
        memory = as_device_buffer(buffer)
        if memory.dtype != self._dtypes[name]:
            raise EngineError(f"{self._name} takes {name} as {self._dtypes[name]}, was given {memory.dtype}.")
        return memory

    def _profile_for(self, shapes: Mapping[str, _Shape]) -> int:
        for index, ranges in enumerate(self._profiles):
            if all(_within(shapes[name], *ranges[name]) for name in self._inputs):
                return index
        raise EngineError(self._no_profile(shapes))

    def _no_profile(self, shapes: Mapping[str, _Shape]) -> str:
        unmatched = [
            name for name in self._inputs if not all(_within(shapes[name], *ranges[name]) for ranges in self._profiles)
        ]
        requested = ", ".join(f"{name} {shapes[name]}" for name in unmatched)
        built = "; ".join(
            ", ".join(f"{name} {ranges[name][0]} to {ranges[name][1]}" for name in unmatched)
            for ranges in self._profiles
        )
        return (
            f"{self._name} has no profile for {requested}. It was built for {built}. "
            "Request a supported shape, or rebuild with other --rows or --resolution."
        )

    def _context_in(self, profile: int) -> Any:
        context = self._contexts.create()
        require(context is not None, "create an execution context: is the GPU's memory full?", self._log)
        selected = context.set_optimization_profile_async(profile, self._stream.handle)
        require(selected, f"select profile {profile}", self._log)
        return context

    def _set_shapes(self, context: Any, memory: Mapping[str, DeviceBuffer]) -> None:
        for name in self._inputs:
            require(context.set_input_shape(name, memory[name].shape), f"set the shape of {name}", self._log)
        try:
            unknown = context.infer_shapes()
        except RuntimeError as error:
            raise EngineError(f"{self._name} cannot combine these input shapes: {error}") from error
        require(not unknown, f"infer the shapes of {unknown}", self._log)
        for name, buffer in memory.items():
            computed = tuple(context.get_tensor_shape(name))
            if computed != buffer.shape:  # a smaller buffer would be written past its end
                raise EngineError(f"{self._name} computes {name} as {computed}, was given {buffer.shape}.")


def _within(shape: _Shape, smallest: _Shape, largest: _Shape) -> bool:
    return len(shape) == len(smallest) and all(
        low <= n <= high for low, n, high in zip(smallest, shape, largest, strict=True)
    )
