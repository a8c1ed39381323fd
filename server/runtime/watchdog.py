"""What notices that the device hangs: a thread of its own, since whoever waits for the device cannot."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

_LEAST = 10.0  # seconds; a busy machine may hold up anything for some
_LOOK = 0.5  # seconds between looks


@dataclass(slots=True)
class _Limit:
    """A context manager of its own, not a generator: one is made for every step."""

    watchdog: Watchdog
    seconds: float
    what: object
    deadline: float = 0.0

    def __enter__(self) -> None:
        self.deadline = time.monotonic() + self.seconds
        self.watchdog.limited = self

    def __exit__(self, *_: object) -> None:
        self.watchdog.limited = None


class Watchdog:
    """Bites once if a piece of the device's work takes many times what it should."""

    def __init__(self, bite: Callable[[str], None], *, patience: float) -> None:
        """Pieces may take `patience` times what is expected of them, and no less than 10 seconds; 0 waits forever.

        `bite` is called in the watchdog's thread with what hangs.
        """
        self._bite = bite
        self._patience = patience
        self.limited: _Limit | None = None  # what is watched now
        self._closed = threading.Event()

    def start(self) -> None:
        if self._patience:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def limit(self, expected: float, what: object) -> AbstractContextManager[None]:
        """Watch the body, which should take `expected` seconds; `what` is said of it if it does not end."""
        return _Limit(self, max(self._patience * expected, _LEAST), what)

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK):
            limit = self.limited
            if limit and time.monotonic() > limit.deadline:
                self._bite(f"{limit.what} took longer than {limit.seconds:.0f} s.")
                return
