"""The room that speaks to CUDA: which GPU there is, a stream of work on it, and buffers in its memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from engines.base import Array, Buffer, EngineError
from engines.manifest import Gpu

try:
    from cuda import core
    from cuda.bindings import runtime
except ImportError:  # an extra, and `probe` says which
    core = runtime = None

_DEVICE = 0  # CUDA_VISIBLE_DEVICES decides which of several this is
_MEMORY_IS_FULL = (
    "If the GPU's memory is full, build with fewer --rows or a smaller --resolution, or end what else runs on it."
)
_REMEDIES = {
    "cudaErrorMemoryAllocation": _MEMORY_IS_FULL,
    "cudaErrorInsufficientDriver": "The NVIDIA driver is missing, or older than this CUDA: install a new one.",
    "cudaErrorNoDevice": "The NVIDIA driver finds no GPU: see nvidia-smi, and CUDA_VISIBLE_DEVICES.",
}


@dataclass(frozen=True, slots=True)
class Probe:
    """The GPU that was found, or the reason why there is none, in whole sentences."""

    gpu: Gpu | None
    reason: str = ""


def probe() -> Probe:
    """Look for the first GPU. Raises nothing and claims nothing: without a driver, a GPU or cuda-python it says so."""
    if runtime is None:
        return Probe(None, "cuda-python is not installed: pip install 'latentd[cuda]' or 'latentd[rtx]'.")
    try:
        check(runtime.cudaGetDeviceCount())
        device = core.Device(_DEVICE)
        major, minor = device.compute_capability
        return Probe(Gpu(name=device.name, compute_capability=f"{major}.{minor}"))
    except Exception as error:  # cuda.core raises its own classes, and those of whoever looks for the driver
        return Probe(None, str(error))


def check(result: tuple[Any, ...]) -> Any:
    """What a call of cuda.bindings returned beside its status.

    Raises:
        EngineError: the status is not success.
    """
    status, *values = result
    if int(status):
        remedy = _REMEDIES.get(status.name, "See nvidia-smi and the kernel's log, then restart.")
        text = runtime.cudaGetErrorString(status)[1].decode()
        raise EngineError(f"CUDA error {int(status)}, {text}. {remedy}")
    return values[0] if len(values) == 1 else tuple(values)


class Stream:
    """Work that the GPU does in the order it was given, and the memory that the work is done on."""

    def __init__(self, stream: Any, memory: Any, *, calls: Any = runtime) -> None:
        """Over a `cuda.core.Stream` and `MemoryResource`; `calls` is `cuda.bindings.runtime` or what stands for it."""
        self._stream = stream
        self._memory = memory
        self._calls = calls

    @property
    def handle(self) -> int:
        return int(self._stream.handle)

    def allocate(self, size: int) -> Any:
        """A `cuda.core.Buffer` of `size` bytes, aligned to 256, with anything in it. Freed with its last reference."""
        try:
            return self._memory.allocate(size, stream=self._stream)
        except Exception as error:  # cuda.core raises its own classes, none of them public
            raise EngineError(f"CUDA gave no {size / 2**20:.1f} MiB: {error}. {_MEMORY_IS_FULL}") from error

    def copy(self, to: int, source: int, *, size: int) -> None:
        """Copy `size` bytes between addresses, of the GPU or of the host; host memory stays in use until `wait`."""
        kind = self._calls.cudaMemcpyKind.cudaMemcpyDefault  # the driver tells the directions by the addresses
        check(self._calls.cudaMemcpyAsync(to, source, size, kind, self.handle))

    def zero(self, address: int, *, size: int) -> None:
        check(self._calls.cudaMemsetAsync(address, 0, size, self.handle))

    def wait(self) -> None:
        """Return when everything given so far is done. Raises EngineError if any of it failed."""
        check(self._calls.cudaStreamSynchronize(self.handle))


def open_stream() -> Stream:
    """A stream on the first GPU, which becomes this thread's current device. Raises EngineError."""
    found = probe()
    if found.gpu is None:
        raise EngineError(f"There is no GPU to work on. {found.reason}")
    try:
        device = core.Device(_DEVICE)
        device.set_current()
        # Non-blocking: the default stream, on which other libraries work, neither waits for it nor holds it up.
        stream = device.create_stream(options=core.StreamOptions(nonblocking=True))
        return Stream(stream, device.memory_resource)
    except Exception as error:  # cuda.core raises its own classes, none of them public
        raise EngineError(f"{found.gpu.name} cannot be opened: {error}. See nvidia-smi for who holds it.") from error


class DeviceBuffer:
    """Memory on the GPU under the `Buffer` protocol, zeroed when it is made."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, stream: Stream) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._stream = stream
        self._memory = stream.allocate(self.nbytes)
        stream.zero(self.address, size=self.nbytes)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def address(self) -> int:
        return int(self._memory.handle)

    def write(self, values: Array, *, at: int | None = None) -> None:
        """Returns when `values` may be changed again."""
        host = self._laid_out(values, self.shape if at is None else self.shape[1:])
        self._stream.copy(self._address_of(at), host.ctypes.data, size=host.nbytes)
        self._stream.wait()

    def copy_from(self, source: Buffer, *, at: int) -> None:
        """Raises EngineError for memory of another device, type or size than the entry's."""
        if not isinstance(source, DeviceBuffer):
            raise EngineError(f"This backend copies from the GPU's memory, was given {type(source).__name__}.")
        if (source.dtype, source.nbytes * self.shape[0]) != (self.dtype, self.nbytes):
            given, entry = f"{source.dtype} {source.shape}", f"{self.dtype} {self.shape[1:]}"
            raise EngineError(f"An entry is {entry}, was given {given}.")
        self._stream.copy(self._address_of(at), source.address, size=source.nbytes)

    def read(self, *, at: int | None = None) -> Array:
        """Waits for the work given before."""
        host = np.empty(self.shape if at is None else self.shape[1:], self.dtype)
        self._stream.copy(host.ctypes.data, self._address_of(at), size=host.nbytes)
        self._stream.wait()
        return host

    def _laid_out(self, values: Array, shape: tuple[int, ...]) -> Array:
        """`values` as they lie on the GPU: themselves if they do already, else a copy."""
        if (values.shape, values.dtype) == (shape, self.dtype) and values.flags.c_contiguous:
            return values
        copy = np.empty(shape, self.dtype)
        np.copyto(copy, values)
        return copy

    def _address_of(self, at: int | None) -> int:
        if at is None:
            return self.address
        entry = range(self.shape[0])[at]  # IndexError here, where an address beyond the end would overwrite others
        return self.address + entry * (self.nbytes // self.shape[0])
