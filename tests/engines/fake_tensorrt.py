"""TensorRT's runtime, and the CUDA under it, over the host's memory.

The module stands for the package `tensorrt`, of which it has what `__all__` names. An engine file is JSON: the ONNX
graph that ONNX Runtime computes in its place, and the profiles. Whoever calls out of order, or names memory or shapes
that do not fit, is refused as by the real one: False, None or a line of log, and never an exception.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Mapping
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort
from cuda import core
from cuda.bindings import runtime

from engines.base import Array
from engines.cuda import Stream

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

SCRATCH = 4096  # bytes that every context needs
_ALIGNMENT = 256
_HANDLE = 7  # of the only stream there is

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # least, best, largest shape of each input


def write_engine(path: Path, onnx: Path, profiles: list[Profile]) -> Path:
    """What a compiler would have written."""
    path.write_text(json.dumps({"onnx": str(onnx), "profiles": profiles}))
    return path


class HostMemory(core.MemoryResource):  # type: ignore[misc]
    """The host's memory where a GPU's is expected: aligned like it, and as full of old bytes."""

    def __init__(self) -> None:
        self.live: dict[int, Array] = {}

    def allocate(self, size: int, *, stream: Any = None) -> Any:  # noqa: ARG002 - cuda.core's signature
        block = np.full(size + _ALIGNMENT, 0xAB, np.uint8)
        address = -(-block.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        self.live[address] = block
        return core.Buffer.from_handle(address, size, mr=self)

    def deallocate(self, ptr: Any, size: int, *, stream: Any = None) -> None:  # noqa: ARG002 - cuda.core's signature
        self.live.pop(int(ptr))[:] = 0xAB  # whoever reads it later computes nonsense

    @property
    def is_device_accessible(self) -> bool:
        return False

    @property
    def is_host_accessible(self) -> bool:
        return True

    @property
    def device_id(self) -> int:
        return -1


class HostRuntime:
    """What `engines.cuda` calls of cuda.bindings.runtime. `status` is what every call returns."""

    cudaMemcpyKind = runtime.cudaMemcpyKind  # noqa: N815 - CUDA's own name

    def __init__(self) -> None:
        self.status = runtime.cudaError_t.cudaSuccess

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, _kind: Any, _stream: int) -> tuple[Any]:  # noqa: N802 - CUDA's
        ctypes.memmove(dst, src, count)
        return (self.status,)

    def cudaMemsetAsync(self, address: int, value: int, count: int, _stream: int) -> tuple[Any]:  # noqa: N802 - CUDA's
        ctypes.memset(address, value, count)
        return (self.status,)

    def cudaStreamSynchronize(self, _stream: int) -> tuple[Any]:  # noqa: N802 - CUDA's own name
        return (self.status,)


class _HostQueue:
    handle = _HANDLE


def host_stream(*, memory: HostMemory | None = None, calls: HostRuntime | None = None) -> Stream:
    """A stream whose GPU is the host."""
    return Stream(_HostQueue(), memory or HostMemory(), calls=calls or HostRuntime())


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
    INT64 = "tensor(int64)"
    UINT8 = "tensor(uint8)"


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(Enum):
    STATIC = 0
    USER_MANAGED = 2


def nptype(trt_type: DataType) -> type:
    kinds = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "UINT8": np.uint8}
    if trt_type.name not in kinds:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return kinds[trt_type.name]


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            content = json.loads(serialized_engine)
        except ValueError:
            self._logger.log(ILogger.ERROR, "Serialization assertion magicTag failed.")
            return None
        return ICudaEngine(ort.InferenceSession(content["onnx"]), content["profiles"], self._logger)


class ICudaEngine:
    def __init__(self, session: ort.InferenceSession, profiles: list[Profile], logger: ILogger) -> None:
        self._session = session
        self._profiles = profiles
        self._logger = logger
        self._inputs: dict[str, Any] = {one.name: one for one in session.get_inputs()}
        self._tensors: dict[str, Any] = {**self._inputs, **{one.name: one for one in session.get_outputs()}}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def device_memory_size_v2(self) -> int:
        return SCRATCH

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


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._profile: int | None = None
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self._engine.num_optimization_profiles or stream_handle != _HANDLE:
            return self._refuse("no such profile")
        self._profile = profile_index
        self._shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        if self._profile is None or name not in self._engine._inputs:
            return self._refuse("no profile is set, or no such input")
        least, _, largest = self._engine.get_tensor_profile_shape(name, self._profile)
        if len(shape) != len(least) or not all(a <= n <= b for a, n, b in zip(least, shape, largest, strict=True)):
            return self._refuse("the shape is outside the profile")
        self._shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        missing = [name for name in self._engine._inputs if name not in self._shapes]
        if not missing and len(self._dims()) != len(dict(self._dims())):
            raise RuntimeError("dimensions of one name differ")
        return missing

    def get_tensor_shape(self, name: str) -> Shape:
        dims = dict(self._dims())
        return tuple(dims.get(dim, -1) if isinstance(dim, str) else dim for dim in self._engine._tensors[name].shape)

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory % _ALIGNMENT or size < SCRATCH:
            self._refuse("the device memory is too small or not aligned")
        else:
            self._scratch = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors or not memory:
            return self._refuse("no such tensor, or no memory")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if stream_handle != _HANDLE or self._addresses.keys() != self._engine._tensors.keys() or self.infer_shapes():
            return self._refuse("not every tensor has its shape and its memory")
        if not self._scratch[0]:
            return self._refuse("the context has no device memory")
        ctypes.memset(self._scratch[0], 0xCD, self._scratch[1])  # used, so it has to be there
        outputs = [name for name in self._engine._tensors if name not in self._engine._inputs]
        feeds = {name: self._memory(name).copy() for name in self._engine._inputs}
        for name, value in zip(outputs, self._engine._session.run(outputs, feeds), strict=True):
            self._memory(name)[...] = value
        return True

    def _dims(self) -> set[tuple[str, int]]:
        """The named dimensions, with each length that an input gives them."""
        inputs = self._engine._inputs
        pairs = (pair for name, shape in self._shapes.items() for pair in zip(inputs[name].shape, shape, strict=True))
        return {(dim, length) for dim, length in pairs if isinstance(dim, str)}

    def _memory(self, name: str) -> Array:
        """The tensor at the address that was set."""
        shape = self.get_tensor_shape(name)
        dtype: np.dtype[Any] = np.dtype(nptype(self._engine.get_tensor_dtype(name)))
        raw = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(self._addresses[name])
        return np.ctypeslib.as_array(raw).view(dtype).reshape(shape)

    def _refuse(self, reason: str) -> bool:
        self._engine._logger.log(ILogger.ERROR, reason)
        return False
