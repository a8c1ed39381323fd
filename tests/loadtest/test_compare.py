"""Comparison with an earlier run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loadtest.analysis.compare import compare, too_short
from loadtest.analysis.results import LoadLevel, MeasuredLoad, summarize
from tests.loadtest.records import request_record


def random_run(seed: int, *, factor: float = 1.0, rate: float = 10.0, seconds: float = 60.0) -> list[MeasuredLoad]:
    """Return a run of one load with random latencies, `factor` times as long."""
    rng, load = np.random.default_rng(seed), LoadLevel(rate=rate, warm_up=0, seconds=seconds)
    due = np.sort(rng.uniform(0, seconds, int(rate * seconds)))
    latency = 0.2 * rng.lognormal(0, 0.3, len(due)) * factor
    requests = [request_record(float(at), float(took)) for at, took in zip(due, latency, strict=True)]
    return [MeasuredLoad(summarize(load, 0, requests, step_rows={}), tuple(requests))]


def regressed(before: Sequence[MeasuredLoad], after: Sequence[MeasuredLoad]) -> set[str]:
    return {one.figure for one in compare(before, after) if one.regressed}


def test_equal_runs_pass_and_slower_run_regresses() -> None:
    before = random_run(0)
    assert regressed(before, before) == set()
    assert regressed(before, random_run(1)) == set()
    assert {"p50", "p95"} <= regressed(before, random_run(1, factor=1.3))
    assert regressed(random_run(1, factor=1.3), before) == set()  # being faster is not a regression


def test_lower_throughput_is_a_regression() -> None:
    before = random_run(0)
    kept = [one for index, one in enumerate(random_run(1)[0].requests) if index % 10 < 7]
    after = [MeasuredLoad(before[0].point, tuple(kept))]
    assert {"throughput", "goodput"} <= regressed(before, after)


def test_no_completed_request_is_a_regression() -> None:
    before = random_run(0)
    assert regressed(before, [MeasuredLoad(before[0].point, ())]) == {"throughput", "goodput"}


def test_different_loads_are_not_compared() -> None:
    assert compare(random_run(0), random_run(0, rate=11.0)) == []


def test_p99_needs_enough_requests() -> None:
    short = random_run(0, seconds=10.0)
    assert {one.figure for one in compare(short, short)} == {"throughput", "goodput", "p50", "p95"}


def test_latencies_are_not_compared_in_too_short_loads() -> None:
    slow = random_run(0, factor=30.0)
    assert too_short(random_run(0)[0], slow[0])
    assert {one.figure for one in compare(slow, slow)} == {"throughput"}
    assert not too_short(random_run(0)[0], random_run(1)[0])
