"""Overload with and without --degrade-at: what the benchmark sends and reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.process import ServerStartError
from benchmarks.server import degrade
from benchmarks.server.degrade import DegradeResults, Load, Sent, turns
from loadtest.provenance import begin_run


def results(*loads: Load) -> DegradeResults:
    return DegradeResults(
        run=begin_run(["python"]),
        model="demo",
        steps=20,
        capacity=1.0,
        rate=2.0,
        limit=5.0,
        degrade_at=1.0,
        max_waiting=16,
        warm_up=10.0,
        seconds=2.0,
        loads=loads,
    )


def test_the_servers_take_turns_and_each_is_first_in_every_other_round() -> None:
    assert list(turns(2)) == [(0, "plain"), (0, "degrading"), (1, "degrading"), (1, "plain")]


def test_goodput_is_what_is_completed_in_time_since_it_was_due() -> None:
    requests = (
        Sent(due=9.0, ended=10.0, ending="completed", cache="off"),  # of the warm-up
        Sent(due=10.0, ended=15.0, ending="completed", cache="off"),
        Sent(due=10.0, ended=15.5, ending="completed", cache="fast"),  # late
        Sent(due=11.0, ended=12.0, ending="completed", cache="fast"),
        Sent(due=11.0, ended=11.0, ending="refused"),
        Sent(due=11.0, ended=16.0, ending="expired"),
    )
    found = results(*(Load(variant="degrading", round=number, requests=requests) for number in range(2)))
    assert found.goodput("degrading") == 2 * 2 / (2 * 2.0)
    assert found.endings("degrading") == {"completed": 6, "refused": 2, "expired": 2}
    assert found.positions("degrading") == {"off": 2, "fast": 4}
    assert found.completed("plain") == []


def test_a_server_that_does_not_start_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ServerStartError("it did not start")

    monkeypatch.setattr(degrade, "_server", fail)
    assert degrade.main(["--out", str(tmp_path / "out.json")]) == 2
    assert capsys.readouterr().err == "error: it did not start\n"


@pytest.mark.faults  # half a minute of overload
def test_the_demo_is_overloaded_and_only_the_server_that_may_degrades(tmp_path: Path) -> None:
    out = tmp_path / "degrade.json"
    quick = ["--seconds", "10", "--warm-up", "3", "--rounds", "1", "--steps", "6", "--limit", "60"]
    hard = ["--overload", "3", "--degrade-at", "0.05"]
    assert degrade.main(["--out", str(out), *quick, *hard]) == 0
    found = DegradeResults.model_validate_json(out.read_bytes())
    plain, degrading = found.loads
    assert [one.due for one in plain.requests] == [one.due for one in degrading.requests]
    assert set(found.positions("plain")) == {"off"}
    assert {one.cache for one in degrading.requests} & {"fast", "faster"}
