"""A flood of messages becomes a few lines."""

from __future__ import annotations

import logging

from server.startup.log_repeats import Repeats


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def record(template: str = "bad request from %s", *arguments: object, name: str = "http") -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, __file__, 1, template, arguments, None)


def texts(records: list[logging.LogRecord]) -> list[str]:
    return [one.getMessage() for one in records]


def test_the_first_of_a_template_are_admitted_and_the_others_counted() -> None:
    clock = Clock()
    repeats = Repeats(burst=2, seconds=30, clock=clock)
    admitted = [repeats.admit(record("bad request from %s", caller)) for caller in range(1000)]
    assert admitted == [True, True, *[False] * 998]
    assert repeats.summaries() == [], "its window has not ended"
    clock.now = 30
    assert texts(repeats.summaries()) == ["bad request from 0 (repeated 998 more times within 30 s)"]
    assert repeats.summaries() == []
    assert repeats.admit(record("bad request from %s", 7)), "another window begins"


def test_templates_loggers_and_levels_are_counted_apart() -> None:
    repeats = Repeats(burst=1)
    assert repeats.admit(record("one"))
    assert repeats.admit(record("two"))
    assert repeats.admit(record("one", name="other"))
    assert not repeats.admit(record("one"))


def test_what_did_not_repeat_is_not_told() -> None:
    repeats = Repeats(burst=2)
    assert repeats.admit(record())
    assert repeats.summaries(everything=True) == []


def test_exempt_loggers_are_not_counted() -> None:
    repeats = Repeats(exempt={"access"}, burst=1)
    assert all(repeats.admit(record(name="access")) for _ in range(10))


def test_memory_is_bounded_whatever_is_logged() -> None:
    repeats = Repeats(burst=1)
    assert all(repeats.admit(record(f"request {number}")) for number in range(10_000))
    assert len(repeats._windows) <= 256


def test_a_record_that_cannot_be_formatted_is_counted_all_the_same() -> None:
    repeats = Repeats(burst=1)
    admitted = [repeats.admit(record("%d", "no number")) for _ in range(3)]
    assert admitted == [True, False, False]
    assert texts(repeats.summaries(everything=True)) == ["%d (repeated 2 more times within 30 s)"]
