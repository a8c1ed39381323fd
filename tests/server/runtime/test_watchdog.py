"""Hanging is noticed, and nothing else is."""

from __future__ import annotations

import threading
import time

import pytest

from server.runtime import watchdog
from server.runtime.watchdog import Watchdog


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_LEAST", 0.05)
    monkeypatch.setattr(watchdog, "_LOOK", 0.01)


def test_it_bites_once_and_says_what_hangs() -> None:
    bites: list[str] = []
    hung = threading.Event()

    def bite(what: str) -> None:
        bites.append(what)
        hung.set()

    dog = Watchdog(bite, factor=2)
    dog.start()
    with dog.limit(0.01, "A step"):
        assert hung.wait(30)
        time.sleep(0.1)
    assert bites == ["A step took longer than 0 s."]


def test_what_ends_in_time_is_left_alone() -> None:
    bites: list[str] = []
    dog = Watchdog(bites.append, factor=1000)
    dog.start()
    for _ in range(3):
        with dog.limit(1, "A step"):
            time.sleep(0.1)  # more than the least, and less than the patience
        time.sleep(0.1)
    dog.close()
    assert not bites


def test_without_patience_it_waits_forever() -> None:
    bites: list[str] = []
    dog = Watchdog(bites.append, factor=0)
    dog.start()
    with dog.limit(0, "A step"):
        time.sleep(0.2)
    assert not bites
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
