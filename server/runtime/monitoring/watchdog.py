"""Detects that the device hangs, in a thread of its own: the one that waits for the device cannot."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

_MIN_LIMIT = 10.0  # seconds; a busy machine may delay anything for some
_POLL = 0.5  # seconds between checks


@dataclass(slots=True)
class _Limit:
    """A context manager as a class, not a generator: one is made for every step."""

    watchdog: Watchdog
    seconds: float
    what: object

    def __enter__(self) -> None:
        self.watchdog.current = self

    def __exit__(self, *_: object) -> None:
        self.watchdog.current = None


class Watchdog:
    """Calls `on_hang` once if a piece of the device's work takes many times longer than expected.

    It counts its own polls instead of reading a clock: while a process is stopped, or its machine paused, clocks go on,
    and neither the device's work nor the watchdog does.
    """

    def __init__(self, on_hang: Callable[[str], None], *, factor: float) -> None:
        """Work may take `factor` times its expected duration, and at least 10 seconds; 0 disables the watchdog.

        `on_hang` is called in the watchdog's thread, with a sentence that names the work.
        """
        self._on_hang = on_hang
        self._factor = factor
        self.current: _Limit | None = None  # the work that is watched now
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch, unless that was begun."""
        if self._factor and not self._thread:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread, and return when it holds none of the work that it watched.

        Otherwise it might be the one to free that work's memory, or do so when the interpreter ends, which aborts the
        process where C++ code waits for the interpreter's lock.
        """
        self._closed.set()
        if self._thread:
            self._thread.join()

    def limit(self, expected: float, what: object) -> AbstractContextManager[None]:
        """Watch the body, which should take `expected` seconds; `what` names it in the report of a hang."""
        return _Limit(self, max(self._factor * expected, _MIN_LIMIT), what)

    def _watch(self) -> None:
        watched, polls = None, 0  # how many polls have found that work
        while not self._closed.wait(_POLL):
            limit = self.current
            watched, polls = limit, polls + 1 if limit is watched else 0
            if limit and polls * _POLL > limit.seconds:
                self._on_hang(f"{limit.what} took longer than {limit.seconds:.0f} s.")
                return
