"""Signals under load, and devices that are lost, hang or compute NaN: every caller hears of it."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections import Counter

import pytest

from benchmarks.faults.callers import EVENTS, JSON, Caller, Ending, Tally
from engines.demo import BUNDLE as DEMO
from tests.faults.watching import LONG, SHORT
from tests.server.test_lifecycle import unended
from tests.support.bare_server import wait_until
from tests.support.serving import Serving

_CALLERS = 30


class Crowd:
    """Callers of a server, in a thread of their own; `join` returns how their requests ended."""

    def __init__(self, serving: Serving, count: int = _CALLERS, *, steps: int = 20) -> None:
        self.tally = Tally()
        self._serving, self._count, self._steps = serving, count, steps
        self._thread = threading.Thread(target=lambda: asyncio.run(self._ask()))
        self._thread.start()

    async def _ask(self) -> None:
        caller = Caller(self._serving.url, self.tally)
        fields = {**LONG, "num_inference_steps": self._steps}
        async with asyncio.TaskGroup() as group:
            for seed in range(self._count):
                group.create_task(caller.ask({**fields, "seed": seed}, accept=EVENTS if seed % 2 else JSON))

    def join(self) -> Counter[Ending]:
        self._thread.join(120)
        assert not self._thread.is_alive(), "callers still wait"
        assert len(self.tally.answers) == self.tally.sent == self._count, "one answer each"
        return self.tally.endings


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stop_signals_finish_what_was_accepted(how: signal.Signals) -> None:
    with Serving(DEMO) as serving:
        crowd = Crowd(serving)
        wait_until(lambda: unended(serving) == _CALLERS)
        code = serving.stop(how=how, seconds=120)
        assert crowd.join() == {"completed": _CALLERS}
        assert code == 0
        assert "Traceback" not in "".join(serving.stderr)


def test_a_second_signal_ends_sooner_and_everyone_is_answered() -> None:
    with Serving(DEMO) as serving:
        crowd = Crowd(serving, steps=200)
        wait_until(lambda: unended(serving) == _CALLERS)
        serving.process.send_signal(signal.SIGINT)
        wait_until(lambda: any("again" in line or "stopp" in line.lower() for line in serving.stderr))
        code = serving.stop(how=signal.SIGINT, seconds=20)
        endings = crowd.join()
        assert endings.keys() <= {"completed", "unavailable"}
        assert endings["unavailable"] > 0, "it drained in the ordinary way: this proves nothing"
        assert code == 0
        assert "Traceback" not in "".join(serving.stderr)


@pytest.mark.parametrize("how", ["is-lost", "hangs"])
def test_everyone_hears_of_a_broken_device(how: str) -> None:
    with Serving(DEMO, "--watchdog", "2", how, module="tests.support.broken_server") as serving:
        for _ in range(15):  # most of the hundred calls, cheaply
            assert serving.generate(**SHORT).status_code == 200
        crowd = Crowd(serving, steps=40)
        assert serving.process.wait(120) == 70
        endings = crowd.join()
        assert endings["disconnected"] == 0
        assert endings.keys() <= {"completed", "failed", "cancelled", "unavailable", "unreachable"}


def test_everyone_hears_of_broken_pictures() -> None:
    """A device that computes NaN from some moment on: answers, and no picture of noise; the process stays, unready."""
    with Serving(DEMO, "computes-nan", module="tests.support.broken_server") as serving:
        while serving.generate(**SHORT).status_code == 200:
            pass
        crowd = Crowd(serving, steps=2)
        endings = crowd.join()
        assert endings.keys() <= {"failed", "unavailable"}
        assert endings["failed"]
        assert serving.client.get("/v2/health/live").status_code == 200
        wait_until(lambda: serving.client.get("/v2/health/ready").status_code == 503)
        assert serving.stop() == 0
