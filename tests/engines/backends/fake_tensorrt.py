"""TensorRT's runtime over the host's memory, in the streams of `fake_cuda`.

This module replaces the package `tensorrt`, of which it has the names in `__all__`, and `rtx` replaces `tensorrt_rtx`.
An engine file is JSON: the path of an ONNX graph, which ONNX Runtime computes, and the profiles. Calls out of order, or
with memory or shapes that do not fit, are refused as by the real package: by False, None or a log line, never by an
exception. Calls that the real package would accept with undefined results are a fault of the fake GPU.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum, IntEnum
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort

from engines.backends.cuda import Cuda
from engines.backends.tensorrt.device import TensorRtDevice
from engines.backends.tensorrt.rtx import RtxContexts
from engines.build.profiles import shapes
from engines.contract import Array, GraphName, TensorSpec
from engines.manifest import Build, Compiled, File, Geometry, Gpu, Manifest
from tests.engines.backends import fake_cuda
from tests.engines.backends.fake_cuda import FakeCuda, FakeStream

__all__ = [
    "DataType",
    "ExecutionContextAllocationStrategy",
    "ICudaEngine",
    "IExecutionContext",
    "ILogger",
    "Runtime",
    "TensorIOMode",
    "nptype",
]
__version__ = "11.4.0.106"

SCRATCH = 4096  # bytes that every context needs, if the engine's file names no others
FAKE_GPU = Gpu(name="Fake", compute_capability="8.9")
_ALIGNMENT = 256
_INDICES = {  # of pools' rows
    "state": "slot",
    "inpaint": "slot",
    "context": "row_context",
    "features": "row_feature",
    "lora_pool": "row_lora",
}

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # least, best, largest shape of each input


def write_engine(path: Path, onnx: Path, profiles: Sequence[Profile], **traits: int) -> Path:
    """What a compiler would have written. `traits` are `scratch` (bytes), `capturable` and `aux_streams` (0 or 1)."""
    path.write_text(json.dumps({"onnx": str(onnx), "profiles": profiles, **traits}))
    return path


def write_bundle_engine(path: Path, onnx: Path, graph: GraphName, geometry: Geometry, **traits: int) -> Path:
    """The engine that a compiler would have written of a bundle's graph: with all its profiles."""
    specs = [TensorSpec(one.name, "", tuple(one.shape)) for one in ort.InferenceSession(onnx).get_inputs()]
    profiles = [{spec.name: one.of(spec) for spec in specs} for one in shapes(geometry, graph)]
    return write_engine(path, onnx, profiles, **traits)


def write_bundle(bundle: Path, out: Path, **geometry: Any) -> None:
    """A copy of a bundle, with engines for each of its graphs; `geometry` are fields of its manifest to be others."""
    shutil.copytree(bundle, out)
    manifest = Manifest.read(out).model_copy(update=geometry)
    engines = {}
    for name, graph in manifest.graphs.items():
        onnx = out / graph.onnx["fp32"].files[0].path
        file = File.of(write_bundle_engine(out / f"{name}.engine", onnx, name, manifest), root=out)
        engines[name] = Compiled(precision="fp32", files=(file,), profiles=(), key="fake", seconds=0, memory=0)
    builds = {"tensorrt": Build(version=__version__, engines=engines)}
    manifest.model_copy(update={"builds": builds}).save(out)


def fake_device(cuda: FakeCuda | None = None, *, for_rtx: bool = False) -> TensorRtDevice:
    """The device over the fakes, in the thread that calls this. `cuda.faults` is for the test to look at."""
    over = Cuda(cuda or FakeCuda())
    if for_rtx:
        return TensorRtDevice(rtx, over, gpu=FAKE_GPU, contexts=RtxContexts)
    return TensorRtDevice(sys.modules[__name__], over, gpu=FAKE_GPU)


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    ERROR: ClassVar[Severity] = Severity.ERROR
    WARNING: ClassVar[Severity] = Severity.WARNING
    INFO: ClassVar[Severity] = Severity.INFO

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class DataType(Enum):
    FLOAT = "tensor(float)"
    HALF = "tensor(float16)"
    BF16 = "tensor(bfloat16)"
    INT32 = "tensor(int32)"
    INT64 = "tensor(int64)"
    UINT8 = "tensor(uint8)"
    BOOL = "tensor(bool)"


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(Enum):
    STATIC = 0
    USER_MANAGED = 2


def nptype(trt_type: DataType) -> type:
    kinds = {
        "FLOAT": np.float32,
        "HALF": np.float16,
        "INT32": np.int32,
        "INT64": np.int64,
        "UINT8": np.uint8,
        "BOOL": np.bool_,
    }
    if trt_type.name not in kinds:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return kinds[trt_type.name]


class Runtime:
    _engine: ClassVar[type[ICudaEngine]]

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            content = json.loads(serialized_engine)
        except ValueError:
            self._logger.log(ILogger.ERROR, "Serialization assertion magicTag failed.")
            return None
        cuda = fake_cuda.current()
        weights = cuda.take(Path(content["onnx"]).stat().st_size)
        if weights is None:
            self._logger.log(ILogger.ERROR, "Error Code 1: Cuda Runtime (out of memory)")
            return None
        engine = self._engine(content, self._logger)
        weakref.finalize(engine, cuda.give_back, weights).atexit = False
        return engine


@lru_cache(maxsize=32)
def _session(path: str, _written: int) -> ort.InferenceSession:
    """What computes the graph at `path`, which tests load many times.

    In one thread: tiny graphs gain nothing from more, and threads that wait for work spin on the cores of other tests.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options)


class ICudaEngine:
    def __init__(self, content: Mapping[str, Any], logger: ILogger) -> None:
        self._session = _session(content["onnx"], Path(content["onnx"]).stat().st_mtime_ns)
        self._profiles: list[Profile] = content["profiles"]
        self._scratch: int = content.get("scratch", SCRATCH)
        self._capturable = bool(content.get("capturable", 1))
        self._aux_streams: int = content.get("aux_streams", 0)
        self._logger = logger
        self._inputs: dict[str, Any] = {one.name: one for one in self._session.get_inputs()}
        self._tensors: dict[str, Any] = {**self._inputs, **{one.name: one for one in self._session.get_outputs()}}
        self._shapes: dict[tuple[Shape, ...], dict[str, Shape]] = {}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def device_memory_size_v2(self) -> int:
        return self._scratch

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self._tensors[name].type)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Shape]:
        return [tuple(shape) for shape in self._profiles[profile_index][name]]

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> IExecutionContext:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return IExecutionContext(self)

    def _computed(self, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
        """The shape of every output. A graph may name sides of its outputs that no input has, and does not say how they
        follow: then it is run, on zeros, which every graph of ours takes."""
        key = tuple(inputs[name] for name in self._inputs)
        if key not in self._shapes:
            self._shapes[key] = self._named(inputs) or self._tried(inputs)
        return self._shapes[key]

    def _outputs(self) -> list[str]:
        return [name for name in self._tensors if name not in self._inputs]

    def _named(self, inputs: Mapping[str, Shape]) -> dict[str, Shape] | None:
        """None where a side is not named after an input's."""
        dims: dict[Any, int] = {}
        for name, shape in inputs.items():
            dims.update(zip(self._inputs[name].shape, shape, strict=True))
        sides = {name: [dims.get(one, one) for one in self._tensors[name].shape] for name in self._outputs()}
        known = all(isinstance(side, int) for shape in sides.values() for side in shape)
        return {name: tuple(shape) for name, shape in sides.items()} if known else None

    def _tried(self, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
        zeros: dict[str, Array] = {
            name: np.zeros(inputs[name], nptype(self.get_tensor_dtype(name))) for name in self._inputs
        }
        values = self._session.run(self._outputs(), zeros)
        return {name: value.shape for name, value in zip(self._outputs(), values, strict=True)}


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._cuda = fake_cuda.current()
        self._profile: int | None = None
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        self._in_use = threading.Lock()
        self._stream: int | None = None
        self._ran = False  # with these shapes
        self._captured = False
        self._aux: int | None = None
        if engine._aux_streams:
            self._aux = int(self._cuda.cudaStreamCreateWithPriority(self._cuda.cudaStreamNonBlocking, 0)[1])
            weakref.finalize(self, self._cuda.cudaStreamDestroy, self._aux).atexit = False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        with self._set():
            if not 0 <= profile_index < self._engine.num_optimization_profiles or not fake_cuda.stream_of(
                stream_handle
            ):
                return self._refuse("no such profile, or no such stream")
            self._profile = profile_index
            self._shapes.clear()
            return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        with self._set():
            if self._profile is None or name not in self._engine._inputs:
                return self._refuse("no profile is set, or no such input")
            least, _, largest = self._engine.get_tensor_profile_shape(name, self._profile)
            if len(shape) != len(least) or not all(a <= n <= b for a, n, b in zip(least, shape, largest, strict=True)):
                return self._refuse("the shape is outside the profile")
            self._shapes[name] = shape
            self._ran = False
            return True

    def infer_shapes(self) -> list[str]:
        missing = [name for name in self._engine._inputs if name not in self._shapes]
        if not missing and len(self._dims()) != len(dict(self._dims())):
            raise RuntimeError("dimensions of one name differ")
        return missing

    def get_tensor_shape(self, name: str) -> Shape:
        if name in self._shapes:
            return self._shapes[name]
        missing = name in self._engine._inputs or self.infer_shapes()
        return (-1,) if missing else self._engine._computed(self._shapes)[name]

    def set_device_memory(self, memory: int, size: int) -> None:
        with self._set():
            if memory % _ALIGNMENT or size < self._engine._scratch:
                self._refuse("the device memory is too small or not aligned")
            else:
                self._scratch = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        with self._set():
            if name not in self._engine._tensors or not memory or memory % _ALIGNMENT:
                return self._refuse("no such tensor, no memory, or not aligned")
            self._addresses[name] = memory
            return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        with self._alone():
            stream = fake_cuda.stream_of(stream_handle)
            if stream is None or self._addresses.keys() != self._engine._tensors.keys() or self.infer_shapes():
                return self._refuse("not every tensor has its shape and its memory")
            if not self._scratch[0]:
                return self._refuse("the context has no device memory")
            if stream.capture and not (self._ran and self._may_be_captured()):
                stream.capture.broken = True
                return self._refuse("operation not permitted when stream is capturing")
            if self._stream not in (None, stream_handle):
                self._cuda.fault("one context runs on two streams")
            self._stream = stream_handle
            self._cuda.belongs(self._scratch[0], f"stream {stream_handle:#x}")
            self._captured |= stream.capture is not None
            self._ran = True
            return self._give(stream, self._kernel())

    def _may_be_captured(self) -> bool:
        return self._engine._capturable

    def _give(self, stream: FakeStream, kernel: Callable[[], None]) -> bool:
        """Compute on `stream`, or on an auxiliary one that forks from it and joins it again."""
        aside = fake_cuda.stream_of(self._aux) if self._aux else None
        if aside is None:
            stream.give(kernel)
            return True
        forked, joined = (self._cuda.cudaEventCreateWithFlags(0)[1] for _ in range(2))
        self._cuda.cudaEventRecord(forked, stream.handle)
        self._cuda.cudaStreamWaitEvent(aside.handle, forked, 0)
        aside.give(kernel)
        self._cuda.cudaEventRecord(joined, aside.handle)
        self._cuda.cudaStreamWaitEvent(stream.handle, joined, 0)
        return True

    def _kernel(self) -> Callable[[], None]:
        """The computation, with the shapes and addresses of now."""
        places = {name: (address, self.get_tensor_shape(name)) for name, address in self._addresses.items()}
        engine, cuda, (scratch, size) = self._engine, self._cuda, self._scratch

        def tensor(name: str) -> Array | None:
            address, shape = places[name]
            dtype: np.dtype[Any] = np.dtype(nptype(engine.get_tensor_dtype(name)))
            raw = cuda.memory(address, math.prod(shape) * dtype.itemsize)
            return None if raw is None else raw.view(dtype).reshape(shape)

        def use_all(tensors: Mapping[str, Array | None]) -> None:
            """Tell which bytes are read and written; of pools only the rows that a step gathers."""
            cuda.use(scratch, size, writes=True)
            for name, array in tensors.items():
                chosen, entry = _gathered(name, tensors), _there(array).nbytes // max(len(_there(array)), 1)
                for start, length in [(row * entry, entry) for row in chosen] or [(0, _there(array).nbytes)]:
                    cuda.use(places[name][0] + start, length, writes=name not in engine._inputs)

        def compute() -> None:
            used = cuda.memory(scratch, size)
            tensors = {name: tensor(name) for name in places}
            if used is None or any(one is None for one in tensors.values()):
                return  # a fault, and noted as one
            with cuda.using(scratch, size):
                use_all(tensors)
                used[:] = 0xCD
                outputs = engine._outputs()
                feeds = {name: np.array(tensors[name]) for name in engine._inputs}
                for name, value in zip(outputs, engine._session.run(outputs, feeds), strict=True):
                    np.copyto(_there(tensors[name]), value)

        return compute

    def _dims(self) -> set[tuple[str, int]]:
        """The named dimensions, with each length that an input gives them."""
        inputs = self._engine._inputs
        pairs = (pair for name, shape in self._shapes.items() for pair in zip(inputs[name].shape, shape, strict=True))
        return {(dim, length) for dim, length in pairs if isinstance(dim, str)}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        alone = self._in_use.acquire(blocking=False)
        if not alone:
            self._cuda.fault("one context is used by two threads at once")
        try:
            yield
        finally:
            if alone:
                self._in_use.release()

    @contextmanager
    def _set(self) -> Iterator[None]:
        if self._captured:
            self._cuda.fault("a context is set up anew, which its captured graph does not notice")
        with self._alone():
            yield

    def _refuse(self, reason: str) -> bool:
        self._engine._logger.log(ILogger.ERROR, reason)
        return False


def _gathered(name: str, tensors: Mapping[str, Array | None]) -> set[int]:
    """The rows of the pool `name` that the graphs of a bundle read; empty where they read all, as a step its state."""
    index = _INDICES.get(name, "")
    if index not in tensors or (name == "state" and "state_next" in tensors):
        return set()
    return set(_there(tensors[index]).ravel().tolist())


def _there(array: Array | None) -> Array:
    assert array is not None
    return array


Runtime._engine = ICudaEngine


# TensorRT for RTX


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class CudaGraphStrategy(Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class IRuntimeCache:
    """Kernels, by what they were compiled for."""

    def __init__(self) -> None:
        self._kernels: set[str] = set()

    def serialize(self) -> memoryview:
        return memoryview(json.dumps({"version": __version__, "kernels": sorted(self._kernels)}).encode())

    def deserialize(self, blob: bytes) -> bool:
        try:
            content = json.loads(blob)
        except ValueError:
            return False
        if content["version"] != __version__:
            return False
        self._kernels = set(content["kernels"])
        return True


class IRuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self._allocation = ExecutionContextAllocationStrategy.STATIC
        self._cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self._allocation = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class RtxContext(IExecutionContext):
    def __init__(self, engine: RtxEngine, config: IRuntimeConfig) -> None:
        super().__init__(engine)
        self._config = config
        self._compiled = engine._compiled

    def is_stream_capturable(self, stream: int) -> bool:
        return fake_cuda.stream_of(stream) is not None and self._may_be_captured()

    def _kernel(self) -> Callable[[], None]:
        cache, kernel = self._config._cache, str(sorted(self._shapes.items()))
        if cache is not None and kernel not in cache._kernels:
            cache._kernels.add(kernel)
            self._compiled.append(kernel)
        return super()._kernel()

    def _may_be_captured(self) -> bool:
        lazy = DynamicShapesKernelSpecializationStrategy.LAZY
        fixed = self._config.dynamic_shapes_kernel_specialization_strategy is not lazy
        return super()._may_be_captured() and fixed


class RtxEngine(ICudaEngine):
    def __init__(self, content: Mapping[str, Any], logger: ILogger) -> None:
        super().__init__(content, logger)
        self._compiled: list[str] = []

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: Any) -> RtxContext:
        assert isinstance(runtime_config, IRuntimeConfig)
        assert runtime_config._allocation is ExecutionContextAllocationStrategy.USER_MANAGED
        return RtxContext(self, runtime_config)


class RtxRuntime(Runtime):
    _engine = RtxEngine


RTX_NAMES: dict[str, Any] = {
    "CudaGraphStrategy": CudaGraphStrategy,
    "DataType": DataType,
    "DynamicShapesKernelSpecializationStrategy": DynamicShapesKernelSpecializationStrategy,
    "ExecutionContextAllocationStrategy": ExecutionContextAllocationStrategy,
    "ICudaEngine": RtxEngine,
    "IExecutionContext": RtxContext,
    "ILogger": ILogger,
    "IRuntimeCache": IRuntimeCache,
    "IRuntimeConfig": IRuntimeConfig,
    "Runtime": RtxRuntime,
    "TensorIOMode": TensorIOMode,
    "nptype": nptype,
}


rtx: Any = ModuleType("tensorrt_rtx")
vars(rtx).update(RTX_NAMES, __version__="1.7.1.116")
