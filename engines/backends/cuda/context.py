"""CUDA as one thread uses it, and when its objects are freed."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from engines.backends.cuda import status


class DeferredReleases:
    """Frees CUDA's objects after their Python owners, only in the thread that owns the device and outside captures.

    Python finalizes an object in whichever thread drops the last reference, or in a garbage collection. Freeing memory
    waits for the GPU, which no other thread should do; during a capture CUDA refuses it and invalidates the capture.
    """

    def __init__(self) -> None:
        self._owner = threading.get_ident()
        self._pending: deque[Callable[[], object]] = deque()
        self._paused = False

    def release_with(self, owner: object, release: Callable[[], object]) -> None:
        """Call `release` once `owner` is garbage, and ignore its status. At exit the driver frees everything."""
        weakref.finalize(owner, self._defer, release).atexit = False

    def run_pending(self) -> None:
        """Release what is due, unless a capture is open or this is not the owning thread."""
        if self._paused or threading.get_ident() != self._owner:
            return
        while self._pending:
            self._pending.popleft()()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Release nothing inside the `with` block, and what became due in it at its end."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
            self.run_pending()

    def _defer(self, release: Callable[[], object]) -> None:
        self._pending.append(release)
        self.run_pending()


class CudaContext:
    """The CUDA runtime's functions, and the deferred release of what they allocate, for the thread that opens it."""

    def __init__(self, calls: Any = None) -> None:
        """`calls` stands for `cuda.bindings.runtime`, the default."""
        self.calls = status.runtime if calls is None else calls
        self.releases = DeferredReleases()
