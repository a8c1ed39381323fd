"""The module `cuda.bindings.runtime`, with a GPU of its own."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, TypeVar, cast
from weakref import finalize

import numpy as np
from cuda.bindings import runtime

from engines.contract import Array
from tests.engines.backends.fake_cuda.hazards import Hazards, Use
from tests.engines.backends.fake_cuda.schedules import Schedule, Threads
from tests.engines.backends.fake_cuda.streams import Capture, FakeStream, Mark, Work, handles, running

Status = runtime.cudaError_t
_Api = TypeVar("_Api", bound=Callable[..., Any])

GIB = 2**30
_ALIGNMENT = 256
_OLD = 0xAB  # what fresh memory is full of
_FREED = 0xDB  # what freed memory is full of
_thread = threading.local()


def current() -> FakeCuda:
    """The GPU of this thread, as libraries find it."""
    return cast("FakeCuda", _thread.cuda)


@dataclass(eq=False)
class FakeEvent:
    flags: int
    mark: Mark | None = None
    captured: tuple[Capture, FakeStream, int] | None = None  # recorded in a capture, after so much of a stream's work


@dataclass
class Block:
    """Allocated memory."""

    array: Array
    size: int
    pinned: bool


# The values after the status: None unless it is success.
_VALUES = {
    "cudaMemGetInfo": 2,
    "cudaDeviceGetStreamPriorityRange": 2,
    "cudaGetDeviceCount": 1,
    "cudaGetDeviceProperties": 1,
    "cudaMalloc": 1,
    "cudaHostAlloc": 1,
    "cudaStreamCreateWithPriority": 1,
    "cudaEventCreateWithFlags": 1,
    "cudaEventElapsedTime": 1,
    "cudaStreamEndCapture": 1,
    "cudaGraphInstantiate": 1,
}


def _api(method: _Api) -> _Api:
    """One of CUDA's functions: returns the status that a test has planted for it, or the one that stays."""
    nothing = (None,) * _VALUES.get(method.__name__, 0)

    @wraps(method)
    def called(cuda: FakeCuda, *args: Any) -> Any:
        cuda.calls[method.__name__] += 1
        planted = cuda.planted.pop(method.__name__, None)
        if planted is not None:
            status, sticky = planted
            cuda.lost = status if sticky else cuda.lost
            return status, *nothing
        return (cuda.lost, *nothing) if cuda.lost is not None else method(cuda, *args)

    return cast("_Api", called)


class FakeCuda:
    """The module, with a GPU of its own. Names and parameters are those of `cuda.bindings.runtime`."""

    cudaMemcpyKind = runtime.cudaMemcpyKind  # noqa: N815 - the names of CUDA, here and below
    cudaStreamCaptureMode = runtime.cudaStreamCaptureMode  # noqa: N815
    cudaStreamNonBlocking = runtime.cudaStreamNonBlocking  # noqa: N815
    cudaEventBlockingSync = runtime.cudaEventBlockingSync  # noqa: N815
    cudaEventDisableTiming = runtime.cudaEventDisableTiming  # noqa: N815
    cudaHostAllocDefault = runtime.cudaHostAllocDefault  # noqa: N815

    priorities: ClassVar = (0, -5)  # the least and the greatest

    def __init__(self, *, total: int = 24 * GIB, others: int = 0, schedule: Schedule | None = None) -> None:
        """A GPU with so many bytes of memory, of which other programs hold some."""
        self.schedule = schedule or Threads()
        self.hazards = Hazards()
        self.total = total
        self.others = others
        self.faults: list[str] = []
        self.calls: Counter[str] = Counter()
        self.planted: dict[str, tuple[Any, bool]] = {}
        self.lost: Any = None
        self.blocks: dict[int, Block] = {}
        self._graveyard: list[Array] = []  # so that no address is used twice, and late use is noticed
        self._streams: dict[int, FakeStream] = {}
        self._events: dict[int, FakeEvent] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._captures: list[Capture] = []
        self._lock = threading.RLock()
        finalize(self, _close, self._streams).atexit = False
        self._users: dict[int, str] = {}  # by the address of shared scratch
        self._active: Counter[tuple[int, int]] = Counter()

    # For tests, and for the fakes of libraries

    def fail(self, name: str, status: str, *, sticky: bool = False) -> None:
        """Let the next call of `name` return `status`; if sticky, and every call after it."""
        self.planted[name] = (getattr(Status, status), sticky)

    def lose(self, status: str) -> None:
        """Let every call return `status` from now on."""
        self.lost = getattr(Status, status)

    def fault(self, what: str, *, status: str = "cudaErrorIllegalAddress") -> None:
        """Note what must not be, and lose the device over it, as CUDA would."""
        self.faults.append(what)
        self.lose(status)

    @contextmanager
    def gate(self, handle: int) -> Iterator[None]:
        """Hold a stream: what is given to it inside is done only after."""
        opened = threading.Event()
        self._streams[int(handle)].hold(opened)
        try:
            yield
        finally:
            opened.set()
            self.schedule.changed()

    def priority_of(self, handle: int) -> int:
        return self._streams[int(handle)].priority

    def live(self, *, pinned: bool = False) -> list[int]:
        """The sizes of what is allocated, in the order it was."""
        return [block.size for block in list(self.blocks.values()) if block.pinned == pinned]

    def take(self, size: int) -> int | None:
        """Memory for a library, from the GPU; None where there is not enough."""
        with self._lock:
            if sum(self.live()) + self.others + size > self.total:
                return None
            return self._allocated(size, pinned=False)

    def give_back(self, address: int) -> None:
        block = self.blocks.pop(address)
        self.hazards.freed(address)
        block.array[:] = _FREED
        self._graveyard.append(block.array)

    def memory(self, address: int, size: int, *, pinned: bool = False) -> Array | None:
        """The bytes there, or None, and a fault, where not all of them are allocated."""
        block = self._block(address, size)
        if block is not None and self.blocks[block].pinned == pinned:
            raw = (ctypes.c_uint8 * size).from_address(address)
            return np.ctypeslib.as_array(raw)
        kind = "pinned" if pinned else "device"
        self.fault(f"{size} bytes at {address:#x} are not in allocated {kind} memory")
        return None

    def use(self, address: int, size: int, *, writes: bool = False) -> None:
        """Note that the work which is being done uses the bytes there; a fault if nothing orders it and another one."""
        stamp, block = running(), self._block(address, size)
        if stamp and block is not None:
            hazard = self.hazards.add(block, Use(stamp, address, address + size, writes))
            self.faults += [hazard] if hazard else []

    @contextmanager
    def using(self, address: int, size: int) -> Iterator[None]:
        """Work with scratch memory that nothing else may work with meanwhile."""
        key = (address, size)
        with self._lock:
            overlap = any(start < address + size and address < start + n for start, n in self._active)
            self._active[key] += 1
        if overlap:
            self.fault(f"the scratch at {address:#x} is used twice at once")
        try:
            yield
        finally:
            with self._lock:
                self._active -= Counter([key])

    def belongs(self, address: int, to: str) -> None:
        """Scratch memory is one stream's: what orders its users is that they are on it."""
        owner = self._users.setdefault(address, to)
        if owner != to:
            self.fault(f"the scratch at {address:#x} of {owner} is given to {to}")

    # CUDA's functions

    @_api
    def cudaSetDevice(self, device: int) -> Any:  # noqa: N802
        _thread.cuda = self
        return (Status.cudaSuccess if device == 0 else Status.cudaErrorInvalidDevice,)

    @_api
    def cudaGetDeviceCount(self) -> Any:  # noqa: N802
        return Status.cudaSuccess, 1

    @_api
    def cudaGetDeviceProperties(self, device: int) -> Any:  # noqa: N802, ARG002
        found = runtime.cudaDeviceProp()
        found.name, found.major, found.minor = b"Fake GPU".ljust(256, b"\0"), 8, 9
        return Status.cudaSuccess, found

    @_api
    def cudaGetLastError(self) -> Any:  # noqa: N802
        return (Status.cudaSuccess,)

    @_api
    def cudaMemGetInfo(self) -> Any:  # noqa: N802
        return Status.cudaSuccess, self.total - self.others - sum(self.live()), self.total

    @_api
    def cudaDeviceGetStreamPriorityRange(self) -> Any:  # noqa: N802
        return Status.cudaSuccess, *self.priorities

    @_api
    def cudaMalloc(self, size: int) -> Any:  # noqa: N802
        if self._forbidden_in_capture():
            return Status.cudaErrorStreamCaptureUnsupported, None
        address = self.take(size)
        return (Status.cudaErrorMemoryAllocation, None) if address is None else (Status.cudaSuccess, address)

    @_api
    def cudaFree(self, devPtr: int) -> Any:  # noqa: N802, N803
        if self._forbidden_in_capture():
            return (Status.cudaErrorStreamCaptureUnsupported,)
        self._wait_for_all()
        return self._freed(devPtr, pinned=False)

    @_api
    def cudaHostAlloc(self, size: int, flags: int) -> Any:  # noqa: N802, ARG002
        if self._forbidden_in_capture():
            return Status.cudaErrorStreamCaptureUnsupported, None
        with self._lock:
            return Status.cudaSuccess, self._allocated(size, pinned=True)

    @_api
    def cudaFreeHost(self, ptr: int) -> Any:  # noqa: N802
        if self._forbidden_in_capture():
            return (Status.cudaErrorStreamCaptureUnsupported,)
        return self._freed(ptr, pinned=True)

    @_api
    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: int) -> Any:  # noqa: N802
        kinds = self.cudaMemcpyKind
        to_host, from_host = kind == kinds.cudaMemcpyDeviceToHost, kind == kinds.cudaMemcpyHostToDevice
        if self.memory(dst, count, pinned=to_host) is None or self.memory(src, count, pinned=from_host) is None:
            return (Status.cudaErrorInvalidValue,)

        def copy() -> None:
            to, source = self.memory(dst, count, pinned=to_host), self.memory(src, count, pinned=from_host)
            if to is not None and source is not None:
                self.use(src, count)
                self.use(dst, count, writes=True)
                to[:] = source

        return self._give(stream, copy)

    @_api
    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> Any:  # noqa: N802, N803
        if self.memory(devPtr, count) is None:
            return (Status.cudaErrorInvalidValue,)

        def fill() -> None:
            memory = self.memory(devPtr, count)
            if memory is not None:
                self.use(devPtr, count, writes=True)
                memory[:] = value

        return self._give(stream, fill)

    @_api
    def cudaStreamCreateWithPriority(self, flags: int, priority: int) -> Any:  # noqa: N802
        if flags != self.cudaStreamNonBlocking:
            return Status.cudaErrorInvalidValue, None
        made = FakeStream(self, priority)
        self._streams[made.handle] = made
        return Status.cudaSuccess, runtime.cudaStream_t(init_value=made.handle)

    def cudaStreamDestroy(self, stream: int) -> Any:  # noqa: N802 - also on a lost device: its thread has to end
        found = self._streams.pop(int(stream), None)
        if found is None:
            return (Status.cudaErrorInvalidResourceHandle,)
        found.close()
        return (Status.cudaSuccess,)

    @_api
    def cudaStreamSynchronize(self, stream: int) -> Any:  # noqa: N802
        found = self._streams[int(stream)]
        if found.capture:
            found.capture.broken = True
            return (Status.cudaErrorStreamCaptureUnsupported,)
        self._wait(found.mark())
        return (self._outcome(),)

    @_api
    def cudaStreamQuery(self, stream: int) -> Any:  # noqa: N802
        found = self._streams[int(stream)]
        if found.capture:
            found.capture.broken = True
            return (Status.cudaErrorStreamCaptureUnsupported,)
        return (self._outcome() if self._passed(found.mark()) else Status.cudaErrorNotReady,)

    @_api
    def cudaStreamWaitEvent(self, stream: int, event: Any, flags: int) -> Any:  # noqa: N802, ARG002
        found, awaited = self._streams[int(stream)], self._events[int(event)]
        if awaited.captured:
            return (self._joined(found, awaited.captured),)
        if awaited.mark:
            if found.capture:  # a capture knows only its own work
                found.capture.broken = True
                return (Status.cudaErrorStreamCaptureIsolation,)
            found.follow(awaited.mark)
        return (Status.cudaSuccess,)

    @_api
    def cudaEventCreateWithFlags(self, flags: int) -> Any:  # noqa: N802
        handle = next(handles)
        self._events[handle] = FakeEvent(flags)
        return Status.cudaSuccess, runtime.cudaEvent_t(init_value=handle)

    @_api
    def cudaEventDestroy(self, event: Any) -> Any:  # noqa: N802
        found = self._events.pop(int(event), None)
        return (Status.cudaSuccess if found else Status.cudaErrorInvalidResourceHandle,)

    @_api
    def cudaEventRecord(self, event: Any, stream: int) -> Any:  # noqa: N802
        found, recorded = self._streams[int(stream)], self._events[int(event)]
        if found.capture:
            recorded.captured = (found.capture, found, found.capture.given[found])
        else:
            recorded.captured, recorded.mark = None, found.mark()
        return (Status.cudaSuccess,)

    @_api
    def cudaEventQuery(self, event: Any) -> Any:  # noqa: N802
        found = self._events[int(event)]
        if refusal := self._event_refusal(found):
            return (refusal,)
        ready = found.mark is None or self._passed(found.mark)
        return (self._outcome() if ready else Status.cudaErrorNotReady,)

    @_api
    def cudaEventSynchronize(self, event: Any) -> Any:  # noqa: N802
        found = self._events[int(event)]
        if refusal := self._event_refusal(found):
            return (refusal,)
        if found.mark:
            self._wait(found.mark)
        return (self._outcome(),)

    @_api
    def cudaEventElapsedTime(self, start: Any, end: Any) -> Any:  # noqa: N802
        marks = [self._events[int(one)] for one in (start, end)]
        if any(one.flags & self.cudaEventDisableTiming or one.mark is None for one in marks):
            return Status.cudaErrorInvalidResourceHandle, None
        first, last = (one.mark for one in marks)
        assert first is not None
        assert last is not None
        if not (first.passed.is_set() and last.passed.is_set()):
            return Status.cudaErrorNotReady, None
        return Status.cudaSuccess, 1000 * (last.time - first.time)

    @_api
    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> Any:  # noqa: N802
        found = self._streams[int(stream)]
        if found.capture:
            return (Status.cudaErrorIllegalState,)
        found.capture = Capture(found, mode, threading.get_ident())
        self._captures.append(found.capture)
        return (Status.cudaSuccess,)

    @_api
    def cudaStreamEndCapture(self, stream: int) -> Any:  # noqa: N802
        capture = self._streams[int(stream)].capture
        if capture is None:
            return Status.cudaErrorIllegalState, None
        self._captures.remove(capture)
        for one in self._streams.values():
            one.capture = None if one.capture is capture else one.capture
        if capture.thread != threading.get_ident():
            return Status.cudaErrorStreamCaptureWrongThread, None
        if capture.broken:
            return Status.cudaErrorStreamCaptureInvalidated, None
        forked = [one for one in capture.given if one is not capture.origin]
        if any(capture.joined[one] < capture.given[one] for one in forked):
            return Status.cudaErrorStreamCaptureUnjoined, None
        return Status.cudaSuccess, runtime.cudaGraph_t(init_value=self._graph(capture.work))

    @_api
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:  # noqa: N802, ARG002
        return Status.cudaSuccess, runtime.cudaGraphExec_t(init_value=self._graph(self._graphs[int(graph)]))

    @_api
    def cudaGraphLaunch(self, graphExec: Any, stream: int) -> Any:  # noqa: N802, N803
        captured = self._graphs[int(graphExec)]

        def replay() -> None:
            for work in captured:
                work()

        return self._give(stream, replay)

    @_api
    def cudaGraphDestroy(self, graph: Any) -> Any:  # noqa: N802
        return (Status.cudaSuccess if self._graphs.pop(int(graph), None) is not None else Status.cudaErrorInvalidValue,)

    @_api
    def cudaGraphExecDestroy(self, graphExec: Any) -> Any:  # noqa: N802, N803
        return self.cudaGraphDestroy(graphExec)

    @property
    def graphs(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def _graph(self, work: list[Work]) -> int:
        handle = next(handles)
        self._graphs[handle] = work
        return handle

    def _give(self, stream: int, work: Work) -> tuple[Any]:
        self._streams[int(stream)].give(work)
        return (Status.cudaSuccess,)

    def _outcome(self) -> Any:
        return Status.cudaSuccess if self.lost is None else self.lost

    def _allocated(self, size: int, *, pinned: bool) -> int:
        array = np.full(size + _ALIGNMENT, _OLD, np.uint8)
        address = -(-array.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        self.blocks[address] = Block(array, size, pinned)
        return address

    def _freed(self, address: int, *, pinned: bool) -> tuple[Any]:
        block = self.blocks.get(int(address))
        if block is None or block.pinned != pinned:
            self.fault(f"{address:#x} is freed, where nothing of its kind is allocated")
            return (Status.cudaErrorInvalidValue,)
        self.give_back(int(address))
        return (Status.cudaSuccess,)

    def _wait_for_all(self) -> None:
        """As freeing the GPU's memory does."""
        for mark in [stream.mark() for stream in list(self._streams.values())]:
            self._wait(mark)

    def _wait(self, mark: Mark) -> None:
        """The host waits for `mark`, and knows then of all before it."""
        self.schedule.until(mark.passed)
        self.hazards.host_waited(mark.clock)

    def _passed(self, mark: Mark) -> bool:
        """The host looks whether `mark` is passed."""
        self.schedule.look()
        if mark.passed.is_set():
            self.hazards.host_waited(mark.clock)
        return mark.passed.is_set()

    def _block(self, address: int, size: int) -> int | None:
        """The address of the allocated block in which so many bytes are."""
        blocks = list(self.blocks.items())
        return next((start for start, one in blocks if start <= address and address + size <= start + one.size), None)

    def _forbidden_in_capture(self) -> bool:
        """Whether a capture forbids what waits for the GPU: one of this thread, or of any in global mode."""
        everywhere = self.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
        affected = [one for one in self._captures if one.thread == threading.get_ident() or one.mode == everywhere]
        for one in affected:
            one.broken = True
        return bool(affected)

    def _event_refusal(self, event: FakeEvent) -> Any:
        if event.captured:
            event.captured[0].broken = True
            return Status.cudaErrorCapturedEvent
        return Status.cudaErrorStreamCaptureUnsupported if self._forbidden_in_capture() else None

    def _joined(self, stream: FakeStream, recorded: tuple[Capture, FakeStream, int]) -> Any:
        """Let `stream` wait for what was captured on another one, which takes it into the capture."""
        capture, source, count = recorded
        if capture not in self._captures or stream.capture not in (None, capture):
            return Status.cudaErrorStreamCaptureIsolation
        stream.capture = capture
        capture.given[stream] += 0
        if stream is capture.origin:
            capture.joined[source] = max(capture.joined[source], count)
        return Status.cudaSuccess


def _close(streams: dict[int, FakeStream]) -> None:
    for stream in streams.values():
        stream.close()
