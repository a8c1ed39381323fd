"""The search for the knee."""

from __future__ import annotations

import pytest

from loadtest.analysis.results import LoadMetrics
from loadtest.analysis.sweep import is_overloaded, is_sustained, knee, knee_text, next_rate
from tests.loadtest.records import load_metrics


def sweep_rates(limit: float, *, first: float, factor: float = 1.5) -> list[float]:
    """Return the rates that a sweep tries on a server that sustains up to `limit` per second."""
    points: list[LoadMetrics] = []
    while (rate := next_rate(points, first=first, factor=factor)) is not None:
        points.append(load_metrics(rate, goodput=rate if rate <= limit else limit * 0.5))
    return [one.load.rate or 0.0 for one in points]


def test_sweep_ends_at_twice_the_knee() -> None:
    rates = sweep_rates(5.0, first=1.0)
    assert rates == pytest.approx([1.0, 1.5, 2.25, 3.375, 5.0625, 6.75])
    assert max(rates) == 2 * knee([load_metrics(rate, goodput=rate if rate <= 5 else 1) for rate in rates])  # type: ignore[operator]


def test_sweep_that_begins_too_high_halves_the_rate() -> None:
    assert sweep_rates(3.0, first=10.0) == [10.0, 5.0, 2.5]
    assert len(sweep_rates(0.0, first=100.0)) == 7  # it gives up on a server that sustains nothing
    assert len(sweep_rates(1e9, first=1.0)) == 20


def test_sustained_loads() -> None:
    assert is_sustained(load_metrics(10, goodput=9.1))
    assert not is_sustained(load_metrics(10, goodput=8.9))
    assert not is_sustained(load_metrics(10, goodput=10, slowdown=11.0))
    assert not is_sustained(load_metrics(10, goodput=0, slowdown=None))
    assert not is_sustained(load_metrics(0.01, goodput=0, slowdown=None))  # no request completed
    goodput = {4: 1, 1: 1, 2: 2, 8: 8}  # by rate
    assert knee([load_metrics(rate, goodput=value) for rate, value in goodput.items()]) == 2
    assert knee([load_metrics(1, goodput=0)]) is None
    assert is_overloaded([load_metrics(1, goodput=1), load_metrics(2, goodput=1)])


def test_a_server_that_died_sustained_nothing() -> None:
    """Not even the load in which it answered nearly all, nor those before."""
    points = [load_metrics(1, goodput=1), load_metrics(2, goodput=1.9).model_copy(update={"lost": 9.5})]
    assert not is_sustained(points[1])
    assert knee(points) is None
    assert next_rate(points, first=1, factor=2) is None
    assert knee_text(points, None) == ("", "")
