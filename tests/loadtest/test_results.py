"""Metrics derived from request records."""

from __future__ import annotations

import pytest

from loadtest.analysis.results import LoadLevel, percentiles, rows_between, summarize
from loadtest.client import read_metrics
from tests.loadtest.records import request_record


def test_latency_is_measured_from_due_time() -> None:
    one = request_record(10.0, 2.0, late=1.5, stages={"queue": 0.1, "denoise": 0.3})
    assert one.latency == 2.0
    assert one.late == 1.5
    assert one.rest == pytest.approx(1.6)


def test_percentiles_are_interpolated() -> None:
    found = percentiles([float(value) for value in range(101)])
    assert found is not None
    assert (found.p50, found.p90, found.p95, found.p99, found.most) == (50, 90, 95, 99, 100)
    assert percentiles([]) is None


def test_warm_up_is_not_counted() -> None:
    load = LoadLevel(rate=1, warm_up=2, seconds=10)
    requests = [
        request_record(1.0, 0.1, counted=False),  # ended before counting began
        request_record(1.5, 1.0, counted=False),  # ended after it, while the others waited
        request_record(3.0, 0.2),
        request_record(4.0, 0.8),  # after its latency target
        request_record(5.0, 0.01, outcome="refused"),
        request_record(11.9, 0.3),  # in time, but ended after the load
    ]
    found = summarize(load, 0, requests, step_rows={2: 5})
    assert (found.requests, found.offered, found.goodput) == (4, 0.4, 0.2)
    assert found.throughput == pytest.approx(0.3, rel=0.05)
    assert found.outcomes == {"completed": 3, "refused": 1, "not ready": 0, "failed": 0, "client timeout": 0}
    assert found.latency is not None
    assert found.latency.p50 == pytest.approx(0.3)
    assert found.slowdown == pytest.approx(8.0, rel=0.05)
    assert found.kept_up
    assert found.other_failures == 0


def test_late_client_is_reported() -> None:
    load = LoadLevel(rate=1, warm_up=0, seconds=10)
    assert not summarize(load, 0, [request_record(1.0, 0.5, late=0.3)], step_rows={}).kept_up
    assert summarize(load, 0, [request_record(1.0, 50.0, late=0.3)], step_rows={}).kept_up  # negligible


def test_step_rows_are_differences_of_cumulative_histogram() -> None:
    text = "\n".join(
        f'latentd_step_rows_bucket{{le="{le}"}} {count}' for le, count in (("1.0", 1), ("2.0", 5), ("+Inf", 5))
    )
    scrape = read_metrics(f"# TYPE latentd_step_rows histogram\n{text}\n# TYPE process_x gauge\nprocess_x 3\n")
    assert scrape.gauges["process_x"] == 3
    assert rows_between({1.0: 1, 2.0: 2, float("inf"): 2}, scrape.step_rows) == {1: 0, 2: 3}


def test_throughput_is_not_lifted_by_the_warm_up() -> None:
    """Twice the capacity in the warm-up, then what the server can do: the queue is served within the counted time."""
    load = LoadLevel(rate=1, warm_up=10, seconds=10)
    warm_up = [request_record(due / 2, 0.5 + due / 2, counted=False) for due in range(20)]  # the last ends at 19.5
    counted = [request_record(10.0 + due, 10.0) for due in range(10)]
    found = summarize(load, 0, [*warm_up, *counted], step_rows={})
    assert found.throughput == found.offered == 1.0


def test_throughput_of_an_overloaded_server_is_its_capacity() -> None:
    """It completes one request a second of two offered; what waits when the load ends counts with the time it takes."""
    load = LoadLevel(rate=2, warm_up=10, seconds=10)
    requests = [request_record(due / 2, 1.0 + due / 2, counted=due >= 20) for due in range(40)]
    found = summarize(load, 0, requests, step_rows={})
    assert found.offered == 2.0
    assert found.throughput == pytest.approx(1.0, rel=0.01)
