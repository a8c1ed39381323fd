"""CUDA streams under the `Stream` protocol."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np

from engines.backends.cuda.buffers import Allocation, as_device_buffer
from engines.backends.cuda.context import CudaContext
from engines.backends.cuda.events import CudaEvent, as_cuda_event
from engines.backends.cuda.graphs import CudaGraph
from engines.backends.cuda.pinned import CudaReading, PinnedPool
from engines.backends.cuda.status import check, is_complete
from engines.backends.device import Buffer, Event
from engines.contract import Array
from engines.errors import EngineError

try:
    from cuda.bindings.utils import get_cuda_native_handle
except ImportError:  # without the package there is no stream to make
    get_cuda_native_handle = None


class CudaStream:
    """A CUDA stream with pinned memory of its own for copies to and from the host."""

    def __init__(self, cuda: CudaContext, *, urgent: bool = False) -> None:
        self._cuda = cuda
        self._calls = calls = cuda.calls
        least, greatest = check(calls.cudaDeviceGetStreamPriorityRange())
        # Non-blocking: it neither waits for the default stream, on which other libraries work, nor blocks it.
        created = calls.cudaStreamCreateWithPriority(calls.cudaStreamNonBlocking, greatest if urgent else least)
        self.handle = int(get_cuda_native_handle(check(created)))
        self._staging = PinnedPool(cuda)
        cuda.releases.release_with(self, partial(calls.cudaStreamDestroy, self.handle))

    def write(self, buffer: Buffer, values: Array, *, at: int | None = None) -> None:
        """Raises IndexError, ValueError for shapes that do not broadcast, and EngineError."""
        entry = as_device_buffer(buffer).entry(at)
        block = self._staging.take(entry.nbytes)
        np.copyto(block.array(entry.shape, entry.dtype), values)
        self._copy(entry.address, block.address, entry.nbytes, "cudaMemcpyHostToDevice")
        check(self._calls.cudaEventRecord(block.event.handle, self.handle))
        self._staging.put(block)

    def copy(self, source: Buffer, to: Buffer, *, source_at: int | None = None, at: int | None = None) -> None:
        """Raises IndexError, and EngineError for memory of another device, or another dtype or size."""
        given, entry = as_device_buffer(source).entry(source_at), as_device_buffer(to).entry(at)
        if (given.dtype, given.nbytes) != (entry.dtype, entry.nbytes):
            raise EngineError(
                f"A copy goes to {entry.dtype} {entry.shape}, was given {given.dtype} {given.shape}: "
                "both need the same dtype and size."
            )
        self._copy(entry.address, given.address, entry.nbytes, "cudaMemcpyDeviceToDevice")

    def read(self, buffer: Buffer, *, at: int | None = None) -> CudaReading:
        """Raises IndexError and EngineError."""
        entry = as_device_buffer(buffer).entry(at)
        block = self._staging.take(entry.nbytes)
        self._copy(block.address, entry.address, entry.nbytes, "cudaMemcpyDeviceToHost")
        check(self._calls.cudaEventRecord(block.event.handle, self.handle))
        return CudaReading(block, entry.shape, entry.dtype, pool=self._staging)

    def record(self, *, timed: bool = False) -> CudaEvent:
        self._cuda.releases.run_pending()
        event = CudaEvent(self._cuda, timed=timed)
        check(self._calls.cudaEventRecord(event.handle, self.handle))
        return event

    def follow(self, event: Event) -> None:
        check(self._calls.cudaStreamWaitEvent(self.handle, as_cuda_event(event).handle, 0))

    def zero(self, memory: Allocation) -> None:
        """Fill `memory` with zeros and wait until it is, since other streams do not wait for this one."""
        check(self._calls.cudaMemsetAsync(memory.address, 0, memory.size, self.handle))
        check(self._calls.cudaStreamSynchronize(self.handle))

    def wait(self) -> None:
        """Wait until the work is done, or has failed."""
        self._calls.cudaStreamSynchronize(self.handle)

    def check_alive(self) -> None:
        """Raise DeviceLost if the device is lost, and EngineError if earlier work of this stream failed."""
        is_complete(self._calls, self._calls.cudaStreamQuery(self.handle))

    def capture(self, enqueue: Callable[[], None], *, keep: tuple[object, ...]) -> CudaGraph:
        """Capture all work that `enqueue` enqueues on this stream as one graph, without running it.

        The graph keeps `keep`, the objects its work points to, alive.

        Raises:
            EngineError: the work cannot be captured; the stream stays usable. DeviceLost.
        """
        # Thread-local mode: calls of other threads do not invalidate the capture.
        mode = self._calls.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with self._cuda.releases.paused():
            check(self._calls.cudaStreamBeginCapture(self.handle, mode))
            try:
                enqueue()
            except BaseException:
                self.abandon_capture()
                raise
            return self._instantiate(self._calls.cudaStreamEndCapture(self.handle), keep)

    def captured_by_a_library(self) -> AbstractContextManager[None]:
        """A block in which a library may capture this stream by itself: nothing is released meanwhile."""
        return self._cuda.releases.paused()

    def finish_before(self, owner: object, held: object) -> None:
        """Keep `held` after `owner` is garbage until this stream's work is done, which may use it."""
        self._cuda.releases.release_with(owner, partial(_finish, self, held))

    def abandon_capture(self) -> None:
        """End a failed capture, if one is open; the stream stays usable."""
        status, graph = self._calls.cudaStreamEndCapture(self.handle)
        if not int(status):
            self._calls.cudaGraphDestroy(graph)
        self._calls.cudaGetLastError()

    def _instantiate(self, ended: tuple[Any, ...], keep: tuple[object, ...]) -> CudaGraph:
        """`ended` is what cudaStreamEndCapture returned."""
        try:
            graph = check(ended)
            try:
                # Its kernels take the priority of the stream that it is launched on: no flag is needed for that.
                executable = check(self._calls.cudaGraphInstantiate(graph, 0))
            finally:
                self._calls.cudaGraphDestroy(graph)
        except EngineError:
            self._calls.cudaGetLastError()
            raise
        return CudaGraph(self._cuda, executable, stream=self.handle, keep=(self, *keep))

    def _copy(self, to: int, source: int, size: int, kind: str) -> None:
        if size:
            direction = getattr(self._calls.cudaMemcpyKind, kind)
            check(self._calls.cudaMemcpyAsync(to, source, size, direction, self.handle))


def _finish(stream: CudaStream, held: object) -> None:
    """Wait until `stream` no longer uses `held`, which is dropped on return. Lost devices do not let one wait."""
    stream.wait()
    del held


def as_cuda_stream(stream: object) -> CudaStream:
    """`stream`, typed as CUDA's. Raises EngineError for a stream of another device."""
    if not isinstance(stream, CudaStream):
        raise EngineError(f"This backend works on CUDA streams, was given {type(stream).__name__}.")
    return stream
