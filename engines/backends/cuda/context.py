"""CUDA as one thread uses it, and when its objects are freed."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from engines.backends.cuda import status

_released = threading.Lock()  # held while something is released, or captured: not both at once in one process
_due: deque[Callable[[], object]] = deque()  # releases that any thread may run
_of_thread = threading.local()


class DeferredReleases:
    """Frees CUDA's objects after their Python owners: outside captures, and in the thread that owns the device.

    Python finalizes an object in whichever thread drops the last reference, or in a garbage collection. Freeing memory
    waits for the GPU, which no other thread should do; during a capture CUDA refuses it and invalidates the capture.
    Once the owning thread has ended, what is still pending is released at once, and the rest by those who drop it.
    """

    def __init__(self) -> None:
        self._owner = threading.get_ident()
        self._ended = False
        self._pending: deque[Callable[[], object]] = deque()
        _call_at_the_end_of_this_thread(self._end)

    def release_with(self, owner: object, release: Callable[[], object]) -> None:
        """Call `release` once `owner` is garbage, and ignore its status. At exit the driver frees everything."""
        weakref.finalize(owner, self._defer, release).atexit = False

    def run_pending(self) -> None:
        """Release what is due, unless a capture is open or this is not the owning thread, which lives."""
        if self._ended or threading.get_ident() == self._owner:
            with suppress(IndexError):
                while True:
                    _due.append(self._pending.popleft())
            _release_due()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Release nothing inside the `with` block, in any thread, and what became due in it at its end."""
        try:
            with _released:
                yield
        finally:
            self.run_pending()

    def _defer(self, release: Callable[[], object]) -> None:
        self._pending.append(release)
        self.run_pending()

    def _end(self) -> None:
        self._ended = True
        self.run_pending()


def _release_due() -> None:
    """Release what any thread may, unless something else is being released or captured, which continues with it."""
    while _due and _released.acquire(blocking=False):
        try:
            while _due:
                _due.popleft()()
        finally:
            _released.release()


class _Guard:
    """Garbage when its thread ends."""


def _call_at_the_end_of_this_thread(call: Callable[[], None]) -> None:
    """Call `call` in this thread when it ends, before others can join it. Not at the end of the process."""
    guard = _Guard()
    weakref.finalize(guard, call).atexit = False
    vars(_of_thread).setdefault("guards", []).append(guard)


class CudaContext:
    """The CUDA runtime's functions, and the deferred release of what they allocate, for the thread that opens it."""

    def __init__(self, calls: Any = None, *, releases: DeferredReleases | None = None) -> None:
        """`calls` stands for `cuda.bindings.runtime`, the default; `releases` are those of a context to share."""
        self.calls = status.runtime if calls is None else calls
        self.releases = releases or DeferredReleases()
