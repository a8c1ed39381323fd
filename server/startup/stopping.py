"""How the server ends: in stages, within a limit that no client, no device and no busy thread can move."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable

from server.runtime.executor import Executor
from server.startup.http_server import HttpServer
from server.startup.signals import StopSignals

_log = logging.getLogger(__name__)
_TICK = 0.1  # seconds; each counts at most that much, so that a process that was paused loses none of its limit
_ANSWER_SECONDS = 1.0  # in which the device finishes the step of cancelled requests; then they are answered without it
_READ_SECONDS = 0.5  # in which callers read their answers; then the connections are closed
_CLOSE_SECONDS = 0.5  # in which threads end; then the process ends without them
GRACE_SECONDS = _ANSWER_SECONDS + _READ_SECONDS + _CLOSE_SECONDS  # from cancelling to the end of the process


class Stopping:
    """Ends the server on stop signals and after faults. A thread, since the event loop and the executor may be busy.

    The first signal drains: no connection is accepted any more, and accepted requests finish. After `drain_seconds`, or
    on a second signal, they are cancelled and answered; the process ends `GRACE_SECONDS` later at the latest. A third
    signal ends it at once. After a fault of the executor, when everyone has been answered, only the grace is left.
    """

    def __init__(
        self,
        signals: StopSignals,
        server: HttpServer,
        executor: Executor,
        *,
        drain_seconds: float,
        exit_code: Callable[[], int],
    ) -> None:
        self._signals = signals
        self._server = server
        self._executor = executor
        self._drain_seconds = drain_seconds
        self._exit_code = exit_code
        self._count = 0  # signals
        self._fault = threading.Event()

    def start(self) -> None:
        self._signals.keep()
        threading.Thread(target=self._run, name="stopping", daemon=True).start()

    def after_fault(self) -> None:
        """The executor has ended and answered everyone. For any thread."""
        self._fault.set()

    def _run(self) -> None:
        while not self._count and not self._fault.is_set():
            self._tick()
        self._server.should_exit = True
        if not self._executor.ready:
            self._executor.stop_accepting()
        self._wait(self._drain_seconds, unless=lambda: self._count > 1 or self._fault.is_set())
        self._executor.cancel_everyone()
        self._wait(_ANSWER_SECONDS)
        self._executor.answer_everyone()
        self._wait(_READ_SECONDS)
        self._server.disconnect()
        self._wait(_CLOSE_SECONDS)
        self._exit()

    def _wait(self, seconds: float, *, unless: Callable[[], bool] = lambda: False) -> None:
        waited = 0.0
        while waited < seconds and not unless():
            waited += self._tick()

    def _tick(self) -> float:
        """Take a signal, should one come; returns the seconds that counts."""
        began = time.monotonic()
        number = self._signals.take(_TICK)
        # Whoever hangs up does so several times, beside other signals: a shell, its terminal, systemd's SendSIGHUP.
        if number is not None and not (number == signal.SIGHUP and self._count):
            self._count += 1
            _log.info("%s: %s", signal.Signals(number).name, _WHAT_FOLLOWS[min(self._count, 3)])
        if self._count > 2:
            self._exit()
        return min(time.monotonic() - began, _TICK)

    def _exit(self) -> None:
        logging.shutdown()  # which waits for whoever reads the log, for two seconds at most
        os._exit(self._exit_code())  # an interpreter that ends in order would wait for threads


_WHAT_FOLLOWS = {
    1: "accepted requests finish; a second signal cancels them",
    2: "accepted requests are cancelled; a third signal ends the process at once",
    3: "the process ends",
}
