"""Requests of few steps beside others: what the benchmark sends and reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.server import few_steps
from benchmarks.server.few_steps import FewStepsResults, Latencies, schedule
from loadtest.provenance import begin_run


def test_the_same_arrivals_come_every_time_and_closer_together_at_a_higher_rate() -> None:
    slow, fast = (schedule(rate=rate, seconds=100 / rate, share=0.3) for rate in (1.0, 4.0))
    assert [kind for _, kind in slow] == [kind for _, kind in fast]
    assert [due for due, _ in slow] == pytest.approx([4 * due for due, _ in fast])
    assert 0.2 < sum(kind == "few" for _, kind in slow) / len(slow) < 0.4


def test_three_times_as_long_as_alone_is_the_bound() -> None:
    found = FewStepsResults(
        run=begin_run(["python"]),
        steps={"few": 1, "many": 30},
        share=0.3,
        capacity=4.0,
        rate=3.2,
        alone=Latencies(few=(1.0,), many=(5.0,)),
        mixed=Latencies(few=(3.0,), many=(9.0,)),
    )
    assert found.holds
    assert not found.model_copy(update={"mixed": Latencies(few=(3.1,))}).holds


@pytest.mark.faults
def test_the_demo_is_measured_in_a_few_seconds(tmp_path: Path) -> None:
    out = tmp_path / "few-steps.json"
    few_steps.main(["--out", str(out), "--seconds", "4", "--many", "4", "--users", "4"])  # its exit code judges times
    found = FewStepsResults.model_validate_json(out.read_bytes())
    assert found.mixed.few
    assert len(found.mixed.few) == len(found.alone.few)
    assert len(found.mixed.many) == len(found.alone.many)
