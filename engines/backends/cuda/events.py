"""CUDA events under the `Event` protocol."""

from __future__ import annotations

from functools import partial

from engines.backends.cuda.context import CudaContext
from engines.backends.cuda.status import check, is_complete
from engines.backends.device import Event
from engines.errors import EngineError


class CudaEvent:
    """A point in a stream's work. A waiting thread sleeps, which leaves the processor to image encoding."""

    def __init__(self, cuda: CudaContext, *, timed: bool = False) -> None:
        self._calls = calls = cuda.calls
        self._timed = timed
        untimed = 0 if timed else calls.cudaEventDisableTiming  # cheaper to record and to wait for
        self.handle = check(calls.cudaEventCreateWithFlags(calls.cudaEventBlockingSync | untimed))
        cuda.releases.release_with(self, partial(calls.cudaEventDestroy, self.handle))

    def done(self) -> bool:
        return is_complete(self._calls, self._calls.cudaEventQuery(self.handle))

    def wait(self) -> None:
        check(self._calls.cudaEventSynchronize(self.handle))

    def seconds_since(self, earlier: Event) -> float:
        """Raises EngineError unless both events are timed and complete."""
        start = as_cuda_event(earlier)
        if not (self._timed and start._timed):
            raise EngineError("Only events that were recorded with timed=True measure time.")
        milliseconds: float = check(self._calls.cudaEventElapsedTime(start.handle, self.handle))
        return milliseconds / 1000


def as_cuda_event(event: Event) -> CudaEvent:
    """`event`, typed as CUDA's. Raises EngineError for an event of another device."""
    if not isinstance(event, CudaEvent):
        raise EngineError(f"This backend works with CUDA events, was given {type(event).__name__}.")
    return event
