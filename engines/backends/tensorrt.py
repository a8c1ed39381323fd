"""TensorRT. TensorRT for RTX is the same code over the package `tensorrt_rtx`: the names used here are in both."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from engines.backends.cuda import (
    MEMORY_IS_FULL,
    Cuda,
    CudaDevice,
    CudaGraph,
    CudaStream,
    DeviceBuffer,
    Graphs,
    of_cuda,
    on_gpu,
    open_cuda,
    probe,
)
from engines.backends.device import Buffer, Stream
from engines.backends.registry import install_command
from engines.errors import DeviceLost, EngineError
from engines.manifest import Build, Gpu

_logger = logging.getLogger(__name__)

_Shape = tuple[int, ...]
_Ranges = Mapping[str, tuple[_Shape, _Shape]]  # least and largest shape of each input


class Contexts:
    """Makes the execution contexts of one engine. TensorRT for RTX, which does more here, has a kind of its own."""

    def __init__(self, engine: Any, path: Path, *, trt: Any) -> None:
        self.engine = engine
        self.path = path
        self._trt = trt

    def create(self) -> Any:
        """A context whose scratch memory is given to it; None where TensorRT made none."""
        return self.engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def capturable(self, context: Any, stream: CudaStream) -> bool:  # noqa: ARG002 - TensorRT does not tell before
        """Whether it is worth trying."""
        return True

    def end_warm_up(self) -> None:
        """There is nothing to keep for the next start."""


class Scratch:
    """The scratch memory of one stream. Its calls share it, because they are done one after the other."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._size = 1  # at least a byte, so that every context is given an address of its own
        self._memory: DeviceBuffer | None = None

    def need(self, size: int) -> None:
        """Have at least `size` bytes from the next `memory` on."""
        self._size = max(self._size, size)

    def memory(self) -> DeviceBuffer:
        """Who was given a smaller one before keeps that. Raises EngineError."""
        if self._memory is None or self._memory.nbytes < self._size:
            self._memory = self._cuda.allocate((self._size,), np.uint8, purpose="scratch")
        return self._memory


class TensorRtCall:
    """An execution context with its shapes and addresses set. Holds the memory that the context points to.

    Whoever drops it has waited for its work: TensorRT wants the context to live that long.
    """

    def __init__(
        self,
        context: Any,
        memory: tuple[DeviceBuffer, ...],
        *,
        stream: CudaStream,
        contexts: Contexts,
        graphs: Graphs,
        log: Any,
    ) -> None:
        self._context = context
        self._memory = memory
        self._stream = stream
        self._contexts = contexts
        self._graphs = graphs
        self._log = log
        self._graph: CudaGraph | None = None
        self._ran = False

    def launch(self) -> None:
        """The first is plain: TensorRT prepares itself in it, and compiles, which no capture allows. The second is
        captured, and from then on all its kernels are given to the GPU at once, as one graph.
        """
        if self._ran and self._graph is None and self._graphs.possible:
            self._graph = self._captured()
        if self._graph is None:
            self._run()
        else:
            self._graph.launch()

    def _run(self) -> None:
        try:
            self._enqueue()
        except EngineError:
            self._stream.check_alive()  # TensorRT refuses alike on a device that is lost
            raise
        self._ran = True

    def _captured(self) -> CudaGraph | None:
        """None where that cannot be. Streams that TensorRT adds by itself join the capture and leave it by events."""
        if not self._contexts.capturable(self._context, self._stream):
            self._graphs.forbid("TensorRT says that they cannot be captured.")
            return None
        try:
            return self._stream.capture(self._enqueue, keep=(self._context, self._memory))
        except DeviceLost:
            raise
        except EngineError as error:
            self._graphs.forbid(str(error))
            return None

    def _enqueue(self) -> None:
        _require(self._context.execute_async_v3(self._stream.handle), "run a step", self._log)


class TensorRtEngine:
    """A deserialised engine, on the stream whose scratch memory its calls share."""

    def __init__(self, contexts: Contexts, *, trt: Any, stream: CudaStream, scratch: Scratch, log: Any) -> None:
        self._engine = engine = contexts.engine
        self._name = contexts.path.name
        self._trt = trt
        self._stream = stream
        self._scratch = scratch
        self._contexts = contexts
        self._log = log
        self._graphs = Graphs(self._name)
        self._dtypes = self._read_dtypes()
        self._inputs = [one for one in self._dtypes if engine.get_tensor_mode(one) == trt.TensorIOMode.INPUT]
        self._profiles = [self._read_profile(index) for index in range(engine.num_optimization_profiles)]
        scratch.need(engine.device_memory_size_v2)

    def bind(self, buffers: Mapping[str, Buffer]) -> TensorRtCall:
        """Set up a context of its own for `buffers`, in the first profile that takes their shapes."""
        memory = self._checked(buffers)
        context = self._context_in(self._profile_for({name: memory[name].shape for name in self._inputs}))
        self._set_shapes(context, memory)
        scratch = self._scratch.memory()
        context.set_device_memory(scratch.address, scratch.nbytes)
        for name, buffer in memory.items():
            _require(context.set_tensor_address(name, buffer.address), f"take the memory of {name}", self._log)
        return TensorRtCall(
            context,
            (*memory.values(), scratch),
            stream=self._stream,
            contexts=self._contexts,
            graphs=self._graphs,
            log=self._log,
        )

    def _read_dtypes(self) -> dict[str, np.dtype[Any]]:
        """The type of every input and output by name, in the engine's order."""
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        return {name: self._read_dtype(name) for name in names}

    def _read_dtype(self, name: str) -> np.dtype[Any]:
        dtype = self._engine.get_tensor_dtype(name)
        try:
            numpy_type: np.dtype[Any] = np.dtype(self._trt.nptype(dtype))
        except TypeError as error:
            raise EngineError(f"{self._name}: {name} is {dtype}, which numpy lacks: export it as float32.") from error
        return numpy_type

    def _read_profile(self, index: int) -> _Ranges:
        ranges = {name: self._engine.get_tensor_profile_shape(name, index) for name in self._inputs}
        return {name: (tuple(least), tuple(largest)) for name, (least, _best, largest) in ranges.items()}

    def _checked(self, buffers: Mapping[str, Buffer]) -> dict[str, DeviceBuffer]:
        """`buffers`, once they are known to have the names and types of the graph's."""
        if self._dtypes.keys() != buffers.keys():
            raise EngineError(f"{self._name} takes {sorted(self._dtypes)}, was given {sorted(buffers)}.")
        return {name: self._checked_one(name, buffer) for name, buffer in buffers.items()}

    def _checked_one(self, name: str, buffer: Buffer) -> DeviceBuffer:
        memory = on_gpu(buffer)
        if memory.dtype != self._dtypes[name]:
            raise EngineError(f"{self._name} takes {name} as {self._dtypes[name]}, was given {memory.dtype}.")
        return memory

    def _profile_for(self, shapes: Mapping[str, _Shape]) -> int:
        for index, ranges in enumerate(self._profiles):
            if all(_within(shapes[name], *ranges[name]) for name in self._inputs):
                return index
        raise EngineError(self._no_profile(shapes))

    def _no_profile(self, shapes: Mapping[str, _Shape]) -> str:
        disputed = [
            name for name in self._inputs if not all(_within(shapes[name], *ranges[name]) for ranges in self._profiles)
        ]
        wanted = ", ".join(f"{name} {shapes[name]}" for name in disputed)
        built = "; ".join(
            ", ".join(f"{name} {ranges[name][0]} to {ranges[name][1]}" for name in disputed)
            for ranges in self._profiles
        )
        return (
            f"{self._name} has no profile for {wanted}. It was built for {built}. "
            "Ask for less, or build it with other --rows or --resolution."
        )

    def _context_in(self, profile: int) -> Any:
        context = self._contexts.create()
        _require(context is not None, "create a context: is the GPU's memory full?", self._log)
        done = context.set_optimization_profile_async(profile, self._stream.handle)
        _require(done, f"take profile {profile}", self._log)
        return context

    def _set_shapes(self, context: Any, memory: Mapping[str, DeviceBuffer]) -> None:
        for name in self._inputs:
            _require(context.set_input_shape(name, memory[name].shape), f"take the shape of {name}", self._log)
        try:
            unknown = context.infer_shapes()
        except RuntimeError as error:
            raise EngineError(f"{self._name} cannot take these shapes together: {error}") from error
        _require(not unknown, f"infer the shapes of {unknown}", self._log)
        for name, buffer in memory.items():
            computed = tuple(context.get_tensor_shape(name))
            if computed != buffer.shape:  # a smaller buffer would be written past its end
                raise EngineError(f"{self._name} computes {name} as {computed}, was given {buffer.shape}.")


class TensorRtDevice(CudaDevice):
    """The first GPU, through TensorRT."""

    def __init__(self, trt: Any, cuda: Cuda, *, gpu: Gpu, contexts: type[Contexts] = Contexts) -> None:
        """Over the package `trt`: `tensorrt` or `tensorrt_rtx`. Raises EngineError."""
        super().__init__(cuda, name=f"{gpu.name}, {_title(trt.__name__)} {trt.__version__}")
        self._trt = trt
        self._kind = contexts
        self._scratch: dict[CudaStream, Scratch] = {}
        self._loaded: WeakSet[Contexts] = WeakSet()
        self._log = _log_of(trt)
        try:
            self._runtime = trt.Runtime(self._log)
        except (TypeError, RuntimeError) as error:  # pybind11's, where the C++ constructor returned nothing
            raise EngineError(
                f"TensorRT does not start: {self._log.take() or error}. Is the driver new enough?"
            ) from error

    def load(self, path: Path, stream: Stream) -> TensorRtEngine:
        """Deserialise the engine at `path`. That runs code in it: the caller has checked its hash."""
        own = of_cuda(stream)
        free = self._cuda.free()
        contexts = self._kind(self._deserialised(path), path, trt=self._trt)
        self._loaded.add(contexts)
        # TensorRT takes the memory for weights by itself: what is gone now is counted, until the last call is gone.
        self._cuda.note(contexts, f"{path.stem} weights", free - self._cuda.free())
        scratch = self._scratch.setdefault(own, Scratch(self._cuda))
        return TensorRtEngine(contexts, trt=self._trt, stream=own, scratch=scratch, log=self._log)

    def end_warm_up(self) -> None:
        for contexts in self._loaded:
            contexts.end_warm_up()

    def _deserialised(self, path: Path) -> Any:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise EngineError(f"{path} cannot be read: {error}") from error
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise EngineError(self._not_loaded(path, self._log.take()))
        return engine

    def _not_loaded(self, path: Path, errors: str) -> str:
        if "memory" in errors.lower():
            return f"{path} does not fit into the GPU's memory: {errors} {self._cuda.holders()} {MEMORY_IS_FULL}"
        return f"TensorRT did not load {path}; build it on this machine, with this version. {errors}".rstrip()


def open_device(*, threads: int) -> TensorRtDevice:  # noqa: ARG001 - every backend is opened alike
    """Open the GPU through TensorRT. Raises EngineError where the GPU, its driver or the package is missing."""
    return open_package("tensorrt", extra="cuda")


def open_package(package: str, *, extra: str, contexts: type[Contexts] = Contexts) -> TensorRtDevice:
    """Open the GPU through `package`, which is in `extra`. Raises EngineError."""
    found = probe()
    if found.gpu is None:
        raise EngineError(
            f"Backend {package} needs an NVIDIA GPU. {found.reason} "
            "Without one, use the backend onnxruntime or openvino."
        )
    try:
        trt = import_module(package)
    except ImportError as error:
        raise EngineError(f"Backend {package} needs its package ({error}): {install_command(extra)}") from error
    cuda, gpu = open_cuda()
    return TensorRtDevice(trt, cuda, gpu=gpu, contexts=contexts)


def check_fits(build: Build, *, backend: str, version: str, gpu: Gpu | None, bundle: Path) -> None:
    """Tell before loading whether the engines of `build` run here, where `version` of the package and `gpu` are.

    Engines run with the release that built them (its first three numbers). Those of TensorRT run on GPUs of the same
    compute capability; those of TensorRT for RTX on each that the package names.

    Raises:
        EngineError: they do not; says what was built, what is here, and which command builds what would run.
    """
    if gpu is None:
        raise EngineError(
            f"The {backend} engines in {bundle} run on an NVIDIA GPU, and there is none here: "
            "take the backend onnxruntime or openvino."
        )
    accepted = accepted_capabilities(backend)
    if accepted and gpu.compute_capability not in accepted:
        raise EngineError(
            f"{_title(backend)} {_release(version)} runs on compute capability {', '.join(accepted)}; "
            f"here is {_described(gpu)}. Build engines that it runs: {_command(bundle, 'tensorrt')}"
        )
    same_gpu = build.gpu is None or build.gpu.compute_capability == gpu.compute_capability
    if not same_gpu or _release(build.version) != _release(version):
        built_for = f" for {_described(build.gpu)}" if build.gpu else ""
        raise EngineError(
            f"The {backend} engines in {bundle} were built by {_title(backend)} {_release(build.version)}{built_for}; "
            f"here are {_title(backend)} {_release(version)} and {_described(gpu)}. "
            f"Build them here: {_command(bundle, backend)}"
        )


def accepted_capabilities(package: str) -> list[str]:
    """The compute capabilities that `package` names; none where it names none, or is not installed."""
    try:
        names = import_module(package).ComputeCapability.__members__
    except (ImportError, AttributeError):
        return []
    numbers = [name.removeprefix("SM") for name in names if name.startswith("SM")]  # SM89, SM120
    return [f"{number[:-1]}.{number[-1]}" for number in numbers]


def _release(version: str) -> str:
    return ".".join(version.split(".")[:3])


def _title(package: str) -> str:
    return "TensorRT for RTX" if package.endswith("rtx") else "TensorRT"


def _described(gpu: Gpu) -> str:
    return f"{gpu.name} (compute capability {gpu.compute_capability})"


def _command(bundle: Path, backend: str) -> str:
    return f"python build_engines.py compile {bundle} --backend {backend}"


def _within(shape: _Shape, least: _Shape, largest: _Shape) -> bool:
    return len(shape) == len(least) and all(
        low <= n <= high for low, n, high in zip(least, shape, largest, strict=True)
    )


def _require(done: bool, what: str, log: Any) -> None:
    """Turn a refusal, which TensorRT only logs, into an EngineError with what it logged since the last success."""
    errors = log.take()
    if not done:
        raise EngineError(f"TensorRT did not {what}. {errors}".rstrip())


@cache  # a process has one: TensorRT keeps the first that it is given, and ignores others
def _log_of(trt: Any) -> Any:
    """TensorRT's log: warnings and errors go to Python's, and the last errors are kept for the exception."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._errors: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self._errors.append(msg)
                _logger.error("%s", msg)
            elif severity == trt.ILogger.WARNING:
                _logger.warning("%s", msg)

        def take(self) -> str:
            errors = " ".join(self._errors)
            self._errors.clear()
            return errors

    return Log()
