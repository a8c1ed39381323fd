"""The signals that ask a process to stop. Imports nothing heavy: a signal may come before anything else is imported."""

from __future__ import annotations

import queue
import signal
import sys

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # Ctrl-C, kill, a closed terminal, Ctrl-\


class StopSignals:
    """Receives stop signals, for one thread that takes them. Until it does, they end the process at once, with 0."""

    def __init__(self) -> None:
        self._received: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._taken = False
        self._came = False  # one that should have ended the process

    def install(self) -> None:
        """Handle the signals from here on. To be called in the main thread."""
        for number in _SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            signal.signal(number, self._receive)

    def keep(self) -> None:
        """Keep signals for `take` from here on: there are requests to finish, or processes to end.

        Raises SystemExit where one came before. The interpreter ignores that of a handler which runs within a finalizer
        or a weak reference's callback, such as those of imports.
        """
        self._taken = True
        if self._came:
            sys.exit(0)

    def take(self, timeout: float) -> int | None:
        """Wait for the next signal, at most `timeout` seconds; None where none came."""
        try:
            return self._received.get(timeout=timeout)
        except queue.Empty:
            return None

    def ignore(self) -> None:
        """Let no signal change the exit code of a process that ends: the interpreter's end restores its handlers."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, _frame: object) -> None:
        """Called between any two instructions of the main thread: `SimpleQueue.put` is made for that."""
        if not self._taken:
            self._came = True
            sys.exit(0)
        self._received.put(number)
