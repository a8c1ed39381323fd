"""The room that speaks to CUDA: which GPU there is, streams of work on it, and buffers in its memory.

Everything goes through `cuda.bindings.runtime`. Since its release 12.9.1 that lets go of Python's lock around each call
of CUDA, so a thread that waits for the GPU keeps no other from running.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import math
import threading
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from engines.backends.device import ALIGNMENT, Buffer, Event
from engines.backends.registry import install_command
from engines.contract import Array
from engines.errors import DeviceLost, EngineError
from engines.manifest import Gpu

try:
    from cuda.bindings import runtime
    from cuda.bindings.utils import get_cuda_native_handle
except ImportError:  # an extra, and `probe` says which
    runtime = None

_logger = logging.getLogger(__name__)

_DEVICE = 0  # CUDA_VISIBLE_DEVICES decides which of several this is
_SMALLEST = 4096  # bytes of the smallest block of pinned memory: a page, as less is not to be had
MEMORY_IS_FULL = "Build with fewer --rows, a smaller --resolution or --decode-batch, or end what else runs on the GPU."
_REMEDIES = {
    "cudaErrorMemoryAllocation": f"If the GPU's memory is full: {MEMORY_IS_FULL}",
    "cudaErrorInsufficientDriver": "The NVIDIA driver is missing, or older than this CUDA: install a new one.",
    "cudaErrorNoDevice": "The NVIDIA driver finds no GPU: see nvidia-smi, and CUDA_VISIBLE_DEVICES.",
}

# After these, CUDA refuses everything that the process asks of it.
_LOST = {
    # A kernel broke the process's context. CUDA's reference of each: "leaves the process in an inconsistent state and
    # any further CUDA work will return the same error", or "the device cannot be used again".
    "cudaErrorIllegalAddress",
    "cudaErrorLaunchTimeout",
    "cudaErrorAssert",
    "cudaErrorHardwareStackError",
    "cudaErrorIllegalInstruction",
    "cudaErrorMisalignedAddress",
    "cudaErrorInvalidAddressSpace",
    "cudaErrorInvalidPc",
    "cudaErrorLaunchFailure",
    "cudaErrorTensorMemoryLeak",
    # The hardware failed, or another device that the GPU was waiting for.
    "cudaErrorECCUncorrectable",
    "cudaErrorNvlinkUncorrectable",
    "cudaErrorContained",
    "cudaErrorExternalDevice",
    # The GPU, its context or the service in front of it is gone; unknown is what a GPU off the bus returns.
    "cudaErrorDevicesUnavailable",
    "cudaErrorDeviceUninitialized",
    "cudaErrorContextIsDestroyed",
    "cudaErrorMpsConnectionFailed",
    "cudaErrorMpsRpcFailure",
    "cudaErrorMpsServerNotReady",
    "cudaErrorMpsClientTerminated",
    "cudaErrorUnknown",
}


@dataclass(frozen=True, slots=True)
class Probe:
    """The GPU that was found, or the reason why there is none, in whole sentences."""

    gpu: Gpu | None
    reason: str = ""


def probe() -> Probe:
    """Look for the first GPU. Raises nothing and claims nothing: without a driver, a GPU or cuda-python it says so."""
    if runtime is None:
        return Probe(None, f"cuda-python is not installed: {install_command('cuda')}")
    try:
        check(runtime.cudaGetDeviceCount())
        return Probe(_described(runtime))
    except Exception as error:  # cuda.bindings raises its own classes where it finds no library to call
        return Probe(None, str(error))


def _described(calls: Any) -> Gpu:
    found = check(calls.cudaGetDeviceProperties(_DEVICE))
    return Gpu(name=found.name.split(b"\0")[0].decode(), compute_capability=f"{found.major}.{found.minor}")


def check(result: tuple[Any, ...]) -> Any:
    """What a call of cuda.bindings returned beside its status.

    Raises:
        DeviceLost: the status is one that every later call returns as well.
        EngineError: it is another one, and not success.
    """
    status, *values = result
    if int(status):
        remedy = _REMEDIES.get(status.name, "See nvidia-smi and the kernel's log, then restart.")
        text = runtime.cudaGetErrorString(status)[1].decode()
        kind = DeviceLost if status.name in _LOST else EngineError
        raise kind(f"CUDA error {int(status)}, {text}. {remedy}")
    return values[0] if len(values) == 1 else tuple(values)


class _Releases:
    """Gives CUDA back what is no longer referred to: from the thread that owns the device, and not while it captures.

    Objects die wherever the last reference goes, or when Python collects its garbage. Freeing memory waits for the
    GPU, which no other thread should have to do, and inside a capture it is refused and spoils the capture.
    """

    def __init__(self) -> None:
        self._owner = threading.get_ident()
        self._waiting: deque[Callable[[], object]] = deque()
        self._held = False

    def when_dropped(self, owner: object, release: Callable[[], object]) -> None:
        """Call `release`, whose status nobody can use any more, once `owner` has gone. At exit the driver frees all."""
        weakref.finalize(owner, self._later, release).atexit = False

    def free_released(self) -> None:
        """Release what has been dropped, if now is the time for it."""
        if self._held or threading.get_ident() != self._owner:
            return
        while self._waiting:
            self._waiting.popleft()()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Release nothing meanwhile."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self.free_released()

    def _later(self, release: Callable[[], object]) -> None:
        self._waiting.append(release)
        self.free_released()


class Cuda:
    """The first GPU as this process sees it: its memory, and who has how much of it.

    Memory comes from `cudaMalloc`. It is asked for while engines are loaded and never in a step, so it need not be
    quick; and unlike a pool's, it belongs to no stream: freeing it waits for whatever still uses it.
    """

    def __init__(self, calls: Any = None) -> None:
        """Over `cuda.bindings.runtime` or what stands for it; the GPU becomes this thread's. Raises EngineError."""
        self.calls = runtime if calls is None else calls
        self.releases = _Releases()
        self._numbers = itertools.count()
        self._held: dict[int, tuple[str, int]] = {}  # purpose and bytes
        check(self.calls.cudaSetDevice(_DEVICE))
        self._zeroing = CudaStream(self)

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike, *, purpose: str = "other") -> DeviceBuffer:
        """Zeroed memory, aligned to `ALIGNMENT` and freed with its last reference.

        Raises:
            EngineError: the GPU is full; says what takes how much of it, and what to do. DeviceLost.
        """
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = self._memory(max(size, 1), purpose)  # at least a byte, for an address of its own
        self._zeroing.zero(memory)
        return DeviceBuffer(memory, shape, dtype)

    def memory(self) -> dict[str, int]:
        """Bytes in use here by purpose, the largest first."""
        taken: Counter[str] = Counter()
        for purpose, size in list(self._held.values()):
            taken[purpose] += size
        return dict(taken.most_common())

    def free(self) -> int:
        """Bytes of the GPU's memory that nobody has."""
        return int(check(self.calls.cudaMemGetInfo())[0])

    def note(self, owner: object, purpose: str, size: int) -> None:
        """Count `size` bytes, which a library took by itself, as long as `owner` lives."""
        if size > 0:
            number = next(self._numbers)
            self._held[number] = (purpose, size)
            weakref.finalize(owner, self._held.pop, number, None).atexit = False

    def holders(self) -> str:
        """Who has how much of the GPU's memory, in a sentence."""
        free, total = check(self.calls.cudaMemGetInfo())
        here = self.memory()
        listed = ", ".join(f"{purpose} {_amount(size)}" for purpose, size in here.items()) or "nothing yet"
        others = max(total - free - sum(here.values()), 0)
        return (
            f"Of the GPU's {_amount(total)} this process has taken {listed}; "
            f"CUDA itself and other programs hold {_amount(others)}."
        )

    def _memory(self, size: int, purpose: str) -> _Memory:
        self.releases.free_released()
        result = self.calls.cudaMalloc(size)
        if result[0].name == "cudaErrorMemoryAllocation":
            self.calls.cudaGetLastError()  # it is told here, and shall not be found by who looks for errors of its own
            raise EngineError(
                f"The GPU's memory is full: {_amount(size)} for {purpose} cannot be had. "
                f"{self.holders()} {MEMORY_IS_FULL}"
            )
        memory = _Memory(check(result), size)
        self.releases.when_dropped(memory, partial(self.calls.cudaFree, memory.address))
        self.note(memory, purpose, size)
        return memory


def open_cuda() -> tuple[Cuda, Gpu]:
    """The first GPU, for this thread. Raises EngineError."""
    found = probe()
    if found.gpu is None:
        raise EngineError(f"There is no GPU to work on. {found.reason}")
    return Cuda(), found.gpu


def _amount(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


@dataclass(frozen=True, eq=False)
class _Memory:
    """A piece of the GPU's memory. `Cuda` frees it when this goes."""

    address: int
    size: int  # bytes


class DeviceBuffer:
    """Memory on the GPU under the `Buffer` protocol: a piece of it, or part of one."""

    def __init__(self, memory: _Memory, shape: tuple[int, ...], dtype: DTypeLike, *, start: int = 0) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._memory = memory
        self._start = start

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def address(self) -> int:
        return self._memory.address + self._start

    def view(self, shape: tuple[int, ...], dtype: DTypeLike, *, offset: int) -> DeviceBuffer:
        part = DeviceBuffer(self._memory, shape, dtype, start=self._start + offset)
        if offset % ALIGNMENT or not 0 <= offset <= self.nbytes - part.nbytes:
            raise ValueError(f"{part.nbytes} bytes at {offset} are no part of {self.nbytes}, in steps of {ALIGNMENT}.")
        return part

    def entry(self, at: int | None) -> DeviceBuffer:
        """Entry `at` along the first axis, or all of it. Raises IndexError."""
        if at is None:
            return self
        index = range(self.shape[0])[at]  # IndexError here, where an address beyond the end would overwrite others
        start = self._start + index * (self.nbytes // self.shape[0])
        return DeviceBuffer(self._memory, self.shape[1:], self.dtype, start=start)


class CudaEvent:
    """A mark in a stream's work. Whoever waits for it sleeps, so that the processor is free for pictures to encode."""

    def __init__(self, cuda: Cuda, *, timed: bool = False) -> None:
        self._calls = calls = cuda.calls
        self._timed = timed
        untimed = 0 if timed else calls.cudaEventDisableTiming  # cheaper to record and to wait for
        self.handle = check(calls.cudaEventCreateWithFlags(calls.cudaEventBlockingSync | untimed))
        cuda.releases.when_dropped(self, partial(calls.cudaEventDestroy, self.handle))

    def done(self) -> bool:
        return _passed(self._calls, self._calls.cudaEventQuery(self.handle))

    def wait(self) -> None:
        check(self._calls.cudaEventSynchronize(self.handle))

    def seconds_since(self, earlier: Event) -> float:
        """Raises EngineError for events that are not timed, or not passed."""
        start = _of_cuda(earlier)
        if not (self._timed and start._timed):
            raise EngineError("Only events that were recorded with timed=True know their time.")
        milliseconds: float = check(self._calls.cudaEventElapsedTime(start.handle, self.handle))
        return milliseconds / 1000


def _passed(calls: Any, result: tuple[Any, ...]) -> bool:
    """Whether a query found that its work is done. Raises DeviceLost."""
    if result[0].name == "cudaErrorNotReady":
        calls.cudaGetLastError()  # a query leaves its answer there, where libraries look for errors of their own
        return False
    check(result)
    return True


def _of_cuda(event: Event) -> CudaEvent:
    if not isinstance(event, CudaEvent):
        raise EngineError(f"This backend's events are CUDA's, was given {type(event).__name__}.")
    return event


def on_gpu(buffer: Buffer) -> DeviceBuffer:
    """`buffer`, which is known to be the GPU's from here on. Raises EngineError for memory of another device."""
    if not isinstance(buffer, DeviceBuffer):
        raise EngineError(f"This backend works on the GPU's memory, was given {type(buffer).__name__}.")
    return buffer


class _Pinned:
    """Host memory that the GPU copies to and from by itself, while `event` has not passed."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        calls = cuda.calls
        self.size = size
        self.event = CudaEvent(cuda)
        self.address = int(check(calls.cudaHostAlloc(size, calls.cudaHostAllocDefault)))
        # With the event and not its handle: of what dies together in a cycle, the event might go first.
        cuda.releases.when_dropped(self, partial(_unpin, calls, self.address, self.event))

    def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """The memory itself: valid as long as this is."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        raw = (ctypes.c_uint8 * size).from_address(self.address)
        return np.ctypeslib.as_array(raw).view(dtype).reshape(shape)


def _unpin(calls: Any, address: int, event: CudaEvent) -> None:
    calls.cudaEventSynchronize(event.handle)  # a copy may still be under way
    calls.cudaFreeHost(address)


class _PinnedPool:
    """A stream's pinned memory, in blocks of powers of two. New blocks are made only when none of a size is free."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._used: dict[int, deque[_Pinned]] = defaultdict(deque)  # by size

    def take(self, size: int) -> _Pinned:
        """A block of at least `size` bytes, which no copy uses."""
        room = max(_SMALLEST, 1 << (size - 1).bit_length())
        used = self._used[room]
        # A stream works in order, so if the block that was used first is not free, none is.
        return used.popleft() if used and used[0].event.done() else _Pinned(self._cuda, room)

    def put(self, block: _Pinned) -> None:
        """Let `block` be used again, once its event has passed."""
        self._used[block.size].append(block)


class CudaReading:
    """Values on their way into pinned memory, which is used again when this goes."""

    def __init__(self, block: _Pinned, shape: tuple[int, ...], dtype: np.dtype[Any], *, pool: _PinnedPool) -> None:
        self._block = block
        self._shape = shape
        self._dtype = dtype
        weakref.finalize(self, pool.put, block).atexit = False

    def done(self) -> bool:
        return self._block.event.done()

    def result(self) -> Array:
        self._block.event.wait()
        return self._block.array(self._shape, self._dtype).copy()


class CudaStream:
    """A CUDA stream under the `Stream` protocol."""

    def __init__(self, cuda: Cuda, *, urgent: bool = False) -> None:
        self._cuda = cuda
        self._calls = calls = cuda.calls
        least, greatest = check(calls.cudaDeviceGetStreamPriorityRange())
        # Non-blocking: the default stream, on which other libraries work, neither waits for it nor holds it up.
        made = calls.cudaStreamCreateWithPriority(calls.cudaStreamNonBlocking, greatest if urgent else least)
        self.handle = int(get_cuda_native_handle(check(made)))
        self._staging = _PinnedPool(cuda)
        cuda.releases.when_dropped(self, partial(calls.cudaStreamDestroy, self.handle))

    def write(self, buffer: Buffer, values: Array, *, at: int | None = None) -> None:
        """Raises IndexError, ValueError for shapes that do not broadcast, and EngineError."""
        entry = on_gpu(buffer).entry(at)
        block = self._staging.take(entry.nbytes)
        np.copyto(block.array(entry.shape, entry.dtype), values)
        self._copy(entry.address, block.address, entry.nbytes, "cudaMemcpyHostToDevice")
        check(self._calls.cudaEventRecord(block.event.handle, self.handle))
        self._staging.put(block)

    def copy(self, source: Buffer, to: Buffer, *, source_at: int | None = None, at: int | None = None) -> None:
        """Raises IndexError, and EngineError for another device's memory, or another type or size."""
        given, entry = on_gpu(source).entry(source_at), on_gpu(to).entry(at)
        if (given.dtype, given.nbytes) != (entry.dtype, entry.nbytes):
            raise EngineError(
                f"A copy goes to {entry.dtype} {entry.shape}, was given {given.dtype} {given.shape}: "
                "both have one type and size."
            )
        self._copy(entry.address, given.address, entry.nbytes, "cudaMemcpyDeviceToDevice")

    def read(self, buffer: Buffer, *, at: int | None = None) -> CudaReading:
        """Raises IndexError and EngineError."""
        entry = on_gpu(buffer).entry(at)
        block = self._staging.take(entry.nbytes)
        self._copy(block.address, entry.address, entry.nbytes, "cudaMemcpyDeviceToHost")
        check(self._calls.cudaEventRecord(block.event.handle, self.handle))
        return CudaReading(block, entry.shape, entry.dtype, pool=self._staging)

    def record(self, *, timed: bool = False) -> CudaEvent:
        self._cuda.releases.free_released()
        event = CudaEvent(self._cuda, timed=timed)
        check(self._calls.cudaEventRecord(event.handle, self.handle))
        return event

    def follow(self, event: Event) -> None:
        check(self._calls.cudaStreamWaitEvent(self.handle, _of_cuda(event).handle, 0))

    def zero(self, memory: _Memory) -> None:
        """Zero `memory`, and return when it is: other streams do not follow this one."""
        check(self._calls.cudaMemsetAsync(memory.address, 0, memory.size, self.handle))
        check(self._calls.cudaStreamSynchronize(self.handle))

    def check_alive(self) -> None:
        """Raises DeviceLost where the device is, and EngineError where what was given has failed."""
        _passed(self._calls, self._calls.cudaStreamQuery(self.handle))

    def capture(self, give: Callable[[], None], *, keep: tuple[object, ...]) -> CudaGraph:
        """All that `give` gives to this stream as one graph, which keeps `keep`. Nothing of it is done yet.

        Raises:
            EngineError: it cannot be captured; the stream works on as before. DeviceLost.
        """
        # In thread-local mode other threads may do as they like meanwhile.
        mode = self._calls.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with self._cuda.releases.held():
            check(self._calls.cudaStreamBeginCapture(self.handle, mode))
            try:
                give()
            except BaseException:
                self.abandon_capture()
                raise
            return self._instantiated(self._calls.cudaStreamEndCapture(self.handle), keep)

    def abandon_capture(self) -> None:
        """End a capture that came to nothing, if one is open; the stream works on as before."""
        status, graph = self._calls.cudaStreamEndCapture(self.handle)
        if not int(status):
            self._calls.cudaGraphDestroy(graph)
        self._calls.cudaGetLastError()

    def _instantiated(self, ended: tuple[Any, ...], keep: tuple[object, ...]) -> CudaGraph:
        try:
            graph = check(ended)
            try:
                # Its kernels take the priority of the stream that it is launched into: no flag is needed for that.
                executable = check(self._calls.cudaGraphInstantiate(graph, 0))
            finally:
                self._calls.cudaGraphDestroy(graph)
        except EngineError:
            self._calls.cudaGetLastError()
            raise
        return CudaGraph(self._cuda, executable, stream=self, keep=keep)

    def _copy(self, to: int, source: int, size: int, kind: str) -> None:
        if size:
            way = getattr(self._calls.cudaMemcpyKind, kind)
            check(self._calls.cudaMemcpyAsync(to, source, size, way, self.handle))


class CudaGraph:
    """Captured work, given to its stream in one call. It is destroyed before what it points to."""

    def __init__(self, cuda: Cuda, executable: Any, *, stream: CudaStream, keep: tuple[object, ...]) -> None:
        self._calls = cuda.calls
        self._executable = executable
        self._stream = stream
        self._keep = keep
        cuda.releases.when_dropped(self, partial(cuda.calls.cudaGraphExecDestroy, executable))

    def launch(self) -> None:
        """Raises EngineError where nothing was given. DeviceLost."""
        check(self._calls.cudaGraphLaunch(self._executable, self._stream.handle))


class Graphs:
    """Whether the calls of one engine become graphs. What forbids it is said once, not by each of them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.possible = True

    def forbid(self, reason: str) -> None:
        self.possible = False
        _logger.warning("%s runs without CUDA graphs, which costs time in each step: %s", self._name, reason)


class CudaDevice:
    """What the backends on the GPU have in common: one GPU, its memory and its streams."""

    pads = True  # a graph is captured for one shape

    def __init__(self, cuda: Cuda, *, name: str) -> None:
        self.name = name
        self._cuda = cuda

    def stream(self, name: str, *, urgent: bool = False) -> CudaStream:  # noqa: ARG002 - CUDA's streams have no names
        return CudaStream(self._cuda, urgent=urgent)

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike, *, purpose: str = "other") -> DeviceBuffer:
        return self._cuda.allocate(shape, dtype, purpose=purpose)

    def end_warm_up(self) -> None:
        """There is nothing to keep."""

    def memory(self) -> Mapping[str, int]:
        return self._cuda.memory()


def of_cuda(stream: object) -> CudaStream:
    """`stream`, which is known to be CUDA's from here on. Raises EngineError for another backend's."""
    if not isinstance(stream, CudaStream):
        raise EngineError(f"This backend works on CUDA's streams, was given {type(stream).__name__}.")
    return stream
