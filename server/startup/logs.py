"""Logging that holds nobody up: messages go through a bounded queue, and one thread writes them to standard error.

If nothing reads standard error, if it is closed or its disk is full, messages are lost and counted, and nothing else.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import sys
import threading
from typing import Literal

from server.middleware.access_log import LOGGER as ACCESS_LOG
from server.requests.prompt_log import LOGGER as PROMPT_LOG
from server.startup.json_logs import JsonFormatter
from server.startup.log_repeats import Repeats

LogFormat = Literal["text", "json"]

_ANNOUNCEMENTS = "latentd.announcements"
_ALWAYS = logging.CRITICAL + 10  # a level that every log level lets through
_MOST_WAITING = 4096  # messages
_FLUSH_SECONDS = 2.0  # that the end of the process waits for whoever reads
_POLL_SECONDS = 1.0  # between looks for repetitions to tell of


def start(level: str, log_format: LogFormat = "text") -> LogHandler:
    """Send log messages of at least `level` to standard error; `logging.shutdown` waits for the last of them."""
    handler = LogHandler(_standard_error())
    as_text = _Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(as_text if log_format == "text" else JsonFormatter())
    logging.root.addHandler(handler)
    logging.root.setLevel(level.upper())
    return handler


def announce(text: str, level: str = "INFO") -> None:
    """Write `text` as it is, at every log level, and after the messages before it; as JSON, a message of `level`."""
    logging.getLogger(_ANNOUNCEMENTS).log(_ALWAYS, "%s", text, extra={"announced": level})


def lost() -> int:
    """How many messages were not written."""
    return sum(handler.lost for handler in logging.root.handlers if isinstance(handler, LogHandler))


class LogHandler(logging.Handler):
    """Hands messages to a thread that writes them. Never blocks, and never raises.

    It writes to a duplicate of the descriptor: the number of one that others close is soon that of another file.
    """

    def __init__(self, descriptor: int, *, most_waiting: int = _MOST_WAITING, repeats: Repeats | None = None) -> None:
        super().__init__()
        self._descriptor = os.dup(descriptor)
        self._most_waiting = most_waiting
        self._repeats = repeats or Repeats(exempt={ACCESS_LOG, PROMPT_LOG, _ANNOUNCEMENTS})
        # Its `put` may be interrupted by a signal's handler that logs, where `queue.Queue` would wait for itself.
        self._queue: queue.SimpleQueue[str | threading.Event | _End] = queue.SimpleQueue()
        self._refused = 0  # changed by those who log, under the handler's lock
        self._unwritten = 0  # changed by the writer
        self._ended = False
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    @property
    def lost(self) -> int:
        """Messages that were not written."""
        return self._refused + self._unwritten

    def emit(self, record: logging.LogRecord) -> None:
        if not self._repeats.admit(record):
            return
        if self._queue.qsize() >= self._most_waiting:
            self._refused += 1
            return
        try:
            self._queue.put(self.format(record))
        except Exception:
            self._refused += 1

    def flush(self) -> None:
        """Wait until what was logged is written, for two seconds at most."""
        if self._ended:
            return
        written = threading.Event()
        self._queue.put(written)
        written.wait(_FLUSH_SECONDS)

    def close(self) -> None:
        """End the thread, which closes the descriptor, when it has written what was logged before."""
        self._ended = True
        self._queue.put(_End())
        super().close()

    def _write_all(self) -> None:
        told = 0
        while not isinstance(item := self._next(), _End):
            if isinstance(item, str) and not self._write(item):
                self._unwritten += 1
                continue
            for summary in self._repeats.summaries(everything=isinstance(item, threading.Event)):
                self._write(self.format(summary))
            if self.lost > told and self._queue.empty() and self._write(self.format(_loss(self.lost))):
                told = self.lost
            if isinstance(item, threading.Event):
                item.set()
        os.close(self._descriptor)

    def _next(self) -> str | threading.Event | _End | None:
        try:
            return self._queue.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            return None

    def _write(self, text: str) -> bool:
        """Write a line past `sys.stderr`, whose lock the interpreter needs at its end; say whether that worked."""
        rest = f"{text}\n".encode(errors="backslashreplace")
        try:
            while rest:
                rest = rest[self._write_some(rest) :]
        except OSError:
            return False
        return True

    def _write_some(self, content: bytes) -> int:
        try:
            return os.write(self._descriptor, content)
        except BlockingIOError:  # somebody who shares the terminal or pipe has made it non-blocking
            select.select((), (self._descriptor,), ())
            return 0


class _End:
    """Ends the queue."""


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if record.name == _ANNOUNCEMENTS else super().format(record)


def _loss(count: int) -> logging.LogRecord:
    text = f"{count} log messages were lost so far: standard error was full, or was not read"
    return logging.LogRecord("latentd", logging.WARNING, __file__, 0, text, (), None)


def _standard_error() -> int:
    """The descriptor of standard error; of /dev/null if that is closed.

    Then its number is taken too, or the next socket would have it and receive what libraries write there.
    """
    if sys.stderr is None:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        while descriptor < 2:
            descriptor = os.open(os.devnull, os.O_WRONLY)
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the life of the process
    return sys.stderr.fileno()
