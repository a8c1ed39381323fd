"""What CUDA's functions share: planted and lasting failures, captures, and waiting for streams."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from cuda.bindings import runtime

from tests.engines.backends.fake_cuda.gpu import Gpu, Status
from tests.engines.backends.fake_cuda.streams import Capture, Mark, Work

_Api = TypeVar("_Api", bound=Callable[..., Any])

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


def api(method: _Api) -> _Api:
    """One of CUDA's functions: returns the status that a test has planted for it, or the one that stays."""
    nothing = (None,) * _VALUES.get(method.__name__, 0)

    @wraps(method)
    def called(gpu: Gpu, *args: Any) -> Any:
        gpu.calls[method.__name__] += 1
        planted = gpu.planted.pop(method.__name__, None)
        if planted is not None:
            status, sticky = planted
            gpu.lost = status if sticky else gpu.lost
            return status, *nothing
        return (gpu.lost, *nothing) if gpu.lost is not None else method(gpu, *args)

    return cast("_Api", called)


class Api(Gpu):
    """What the functions are made of."""

    cudaStreamCaptureMode = runtime.cudaStreamCaptureMode  # noqa: N815 - the names of CUDA

    def __init__(self, **memory: Any) -> None:
        """A GPU as `Gpu` takes it."""
        super().__init__(**memory)
        self._captures: list[Capture] = []

    def _give(self, stream: int, work: Work) -> tuple[Any]:
        self._streams[int(stream)].give(work)
        return (Status.cudaSuccess,)

    def _outcome(self) -> Any:
        return Status.cudaSuccess if self.lost is None else self.lost

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

    def _forbidden_in_capture(self) -> bool:
        """Whether a capture forbids what waits for the GPU: one of this thread, or of any in global mode."""
        everywhere = self.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
        affected = [one for one in self._captures if one.thread == threading.get_ident() or one.mode == everywhere]
        for one in affected:
            one.broken = True
        return bool(affected)
