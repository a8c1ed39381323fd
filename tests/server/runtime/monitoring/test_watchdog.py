"""Hanging is noticed, and nothing else is."""

from __future__ import annotations

import threading
import time
import weakref

import pytest

from server.runtime.monitoring import watchdog
from server.runtime.monitoring.watchdog import Watchdog


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_MIN_LIMIT", 0.05)
    monkeypatch.setattr(watchdog, "_POLL", 0.01)


def test_a_hang_is_reported_once_with_its_name() -> None:
    reports: list[str] = []
    hung = threading.Event()

    def on_hang(what: str) -> None:
        reports.append(what)
        hung.set()

    dog = Watchdog(on_hang, factor=2)
    dog.start()
    with dog.limit(0.01, "A step"):
        assert hung.wait(30)
        time.sleep(0.1)
    assert reports == ["A step took longer than 0 s."]


def test_work_within_its_limit_is_not_reported() -> None:
    reports: list[str] = []
    dog = Watchdog(reports.append, factor=1000)
    dog.start()
    for _ in range(3):
        with dog.limit(1, "A step"):
            time.sleep(0.1)  # more than the minimum, and less than the limit
        time.sleep(0.1)
    dog.close()
    assert not reports


def test_a_pause_of_the_process_counts_as_one_poll() -> None:
    """As after SIGSTOP, or where a machine is paused: the clock has gone on, and nobody has worked."""
    polls: list[float] = []
    reported_after: list[int] = []
    hung = threading.Event()

    class Paused(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            time.sleep(0.2 if len(polls) == 2 else 0)  # four times the limit
            polls.append(timeout or 0)
            return hung.is_set()

    def on_hang(_what: str) -> None:
        reported_after.append(len(polls))
        hung.set()

    dog = Watchdog(on_hang, factor=1)
    dog._closed = Paused()
    with dog.limit(0, "A step"):
        dog.start()
        assert hung.wait(30)
    assert reported_after[0] >= watchdog._MIN_LIMIT / watchdog._POLL


def test_when_it_is_closed_its_thread_holds_nothing_of_the_work() -> None:
    """What it held last would be freed in its thread, at any time: memory of a device, or as the interpreter ends."""

    class Slow(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            is_set = super().wait(timeout)
            time.sleep(0.2 if is_set else 0)
            return is_set

    class Work:
        pass

    dog = Watchdog(print, factor=1000)
    dog._closed = Slow()
    dog.start()
    work = Work()
    left = weakref.ref(work)
    with dog.limit(1, work):
        time.sleep(0.1)
    dog.close()
    del work
    assert left() is None


def test_factor_zero_disables_it() -> None:
    reports: list[str] = []
    dog = Watchdog(reports.append, factor=0)
    dog.start()
    with dog.limit(0, "A step"):
        time.sleep(0.2)
    assert not reports
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
