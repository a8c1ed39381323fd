"""What notices that the device hangs: a thread of its own, since whoever waits for the device cannot."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_LEAST = 10.0  # seconds; a busy machine may hold up anything for some
_LOOK = 0.5  # seconds between looks


@dataclass(frozen=True, slots=True)
class _Limit:
    deadline: float
    seconds: float
    what: object


class Watchdog:
    """Bites once if a piece of the device's work takes many times what it should."""

    def __init__(self, bite: Callable[[str], None], *, patience: float) -> None:
        """Pieces may take `patience` times what is expected of them, and no less than 10 seconds; 0 waits forever.

        `bite` is called in the watchdog's thread with what hangs.
        """
        self._bite = bite
        self._patience = patience
        self._limit: _Limit | None = None
        self._closed = threading.Event()

    def start(self) -> None:
        if self._patience:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    @contextmanager
    def limit(self, expected: float, what: object) -> Iterator[None]:
        """Watch the body, which should take `expected` seconds; `what` is said of it if it does not end."""
        seconds = max(self._patience * expected, _LEAST)
        self._limit = _Limit(time.monotonic() + seconds, seconds, what)
        try:
            yield
        finally:
            self._limit = None

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK):
            limit = self._limit
            if limit and time.monotonic() > limit.deadline:
                self._bite(f"{limit.what} took longer than {limit.seconds:.0f} s.")
                return
