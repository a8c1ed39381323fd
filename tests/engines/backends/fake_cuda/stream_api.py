"""CUDA's functions for streams and events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from cuda.bindings import runtime

from tests.engines.backends.fake_cuda.api import Api, api
from tests.engines.backends.fake_cuda.gpu import Status
from tests.engines.backends.fake_cuda.streams import Capture, FakeStream, Mark, handles


@dataclass(eq=False)
class FakeEvent:
    flags: int
    mark: Mark | None = None
    captured: tuple[Capture, FakeStream, int] | None = None  # recorded in a capture, after so much of a stream's work


class StreamApi(Api):
    """Streams, and the events that order their work."""

    cudaStreamNonBlocking = runtime.cudaStreamNonBlocking  # noqa: N815 - the names of CUDA, here and below
    cudaEventBlockingSync = runtime.cudaEventBlockingSync  # noqa: N815
    cudaEventDisableTiming = runtime.cudaEventDisableTiming  # noqa: N815

    priorities: ClassVar = (0, -5)  # the least and the greatest

    def __init__(self, **memory: Any) -> None:
        """A GPU as `Gpu` takes it."""
        super().__init__(**memory)
        self._events: dict[int, FakeEvent] = {}

    @api
    def cudaDeviceGetStreamPriorityRange(self) -> Any:  # noqa: N802
        return Status.cudaSuccess, *self.priorities

    @api
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

    @api
    def cudaStreamSynchronize(self, stream: int) -> Any:  # noqa: N802
        found = self._streams[int(stream)]
        if found.capture:
            found.capture.broken = True
            return (Status.cudaErrorStreamCaptureUnsupported,)
        self._wait(found.mark())
        return (self._outcome(),)

    @api
    def cudaStreamQuery(self, stream: int) -> Any:  # noqa: N802
        found = self._streams[int(stream)]
        if found.capture:
            found.capture.broken = True
            return (Status.cudaErrorStreamCaptureUnsupported,)
        return (self._outcome() if self._passed(found.mark()) else Status.cudaErrorNotReady,)

    @api
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

    @api
    def cudaEventCreateWithFlags(self, flags: int) -> Any:  # noqa: N802
        handle = next(handles)
        self._events[handle] = FakeEvent(flags)
        return Status.cudaSuccess, runtime.cudaEvent_t(init_value=handle)

    @api
    def cudaEventDestroy(self, event: Any) -> Any:  # noqa: N802
        found = self._events.pop(int(event), None)
        return (Status.cudaSuccess if found else Status.cudaErrorInvalidResourceHandle,)

    @api
    def cudaEventRecord(self, event: Any, stream: int) -> Any:  # noqa: N802
        found, recorded = self._streams[int(stream)], self._events[int(event)]
        if found.capture:
            recorded.captured = (found.capture, found, found.capture.given[found])
        else:
            recorded.captured, recorded.mark = None, found.mark()
        return (Status.cudaSuccess,)

    @api
    def cudaEventQuery(self, event: Any) -> Any:  # noqa: N802
        found = self._events[int(event)]
        if refusal := self._event_refusal(found):
            return (refusal,)
        ready = found.mark is None or self._passed(found.mark)
        return (self._outcome() if ready else Status.cudaErrorNotReady,)

    @api
    def cudaEventSynchronize(self, event: Any) -> Any:  # noqa: N802
        found = self._events[int(event)]
        if refusal := self._event_refusal(found):
            return (refusal,)
        if found.mark:
            self._wait(found.mark)
        return (self._outcome(),)

    @api
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
