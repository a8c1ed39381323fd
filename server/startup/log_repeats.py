"""Counts log messages that repeat, so that a flood of them is a few lines."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

_BURST = 5  # messages of one template that are written in one window
_WINDOW_SECONDS = 30.0
_MOST_TEMPLATES = 256  # messages of any others are written as they are


@dataclass(slots=True)
class _Window:
    """The messages of one template since the first of them."""

    ends: float
    first: logging.LogRecord
    count: int = 0


class Repeats:
    """Admits the first messages of each template and window, and counts the others. For any thread."""

    def __init__(
        self,
        *,
        exempt: Collection[str] = (),
        burst: int = _BURST,
        seconds: float = _WINDOW_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Messages of loggers named in `exempt` are always admitted."""
        self._exempt = frozenset(exempt)
        self._burst = burst
        self._seconds = seconds
        self._clock = clock
        self._windows: dict[object, _Window] = {}
        self._lock = threading.RLock()  # a signal's handler may log in the middle of `admit`

    def admit(self, record: logging.LogRecord) -> bool:
        """Whether to write `record`; if not, it is counted."""
        if record.name in self._exempt:
            return True
        kind = record.exc_info[0] if record.exc_info else None
        template = (record.name, record.levelno, str(record.msg), kind)
        with self._lock:
            window = self._windows.get(template)
            if window is None:
                if len(self._windows) < _MOST_TEMPLATES:
                    self._windows[template] = _Window(self._clock() + self._seconds, _bare(record), 1)
                return True
            window.count += 1
            return window.count <= self._burst

    def summaries(self, *, everything: bool = False) -> list[logging.LogRecord]:
        """Close the windows that have ended, or `everything`; a record for each that has left messages out."""
        now = self._clock()
        with self._lock:
            ended = {key: window for key, window in self._windows.items() if everything or now >= window.ends}
            for key in ended:
                del self._windows[key]
        return [self._summary(window) for window in ended.values() if window.count > self._burst]

    def _summary(self, window: _Window) -> logging.LogRecord:
        times = f"{window.count - self._burst:,} more times within {self._seconds:.0f} s"
        window.first.msg = f"{window.first.msg} (repeated {times})"
        return window.first


def _bare(record: logging.LogRecord) -> logging.LogRecord:
    """`record` as text, without the objects that it refers to."""
    try:
        text = record.getMessage()
    except Exception:
        text = str(record.msg)
    return logging.LogRecord(record.name, record.levelno, record.pathname, record.lineno, text, (), None)
