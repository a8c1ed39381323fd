"""The search for the knee: which loads a server sustains, and which rate to try next. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.analysis.results import LoadMetrics

_MIN_GOODPUT = 0.9  # of the offered load
_MAX_SLOWDOWN = 10.0  # times the idle latency, at the 99th percentile
_PAST_KNEE = 2.0  # times the knee: where a sweep ends
_MAX_RATES = 20
_DECREASE = 2.0  # divides the rate while no load has been sustained yet,
_MAX_DECREASES = 6


def is_sustained(point: LoadMetrics) -> bool:
    """Whether goodput kept up with the offered load without runaway latency.

    False without completed requests, and where the server died.
    """
    runs_away = point.slowdown is None or point.slowdown > _MAX_SLOWDOWN
    return point.goodput >= _MIN_GOODPUT * point.offered and not runs_away and point.lost is None


def knee(points: Sequence[LoadMetrics]) -> float | None:
    """Return the highest rate that was sustained together with all rates below it; None if the lowest was not.

    Latency over load bends upwards there, which gives the knee its name. None too if the server died under any load:
    it may have died of those that it seemed to sustain.
    """
    if died(points):
        return None
    found = None
    for point in sorted((one for one in points if one.load.rate), key=lambda one: one.load.rate or 0.0):
        if not is_sustained(point):
            break
        found = point.load.rate
    return found


def died(points: Sequence[LoadMetrics]) -> bool:
    """Whether the server died under one of the loads."""
    return any(point.lost is not None for point in points)


def knee_text(points: Sequence[LoadMetrics], found: float | None) -> tuple[str, str]:
    """Return what is said of the knee `found`, named as in tables, and what follows it; empty without rates."""
    rates = [point for point in points if point.load.rate]
    if not rates or died(points):
        return "", ""
    if found is None:
        return "The server sustained none of these rates.", ""
    label = next(point.load.label for point in rates if point.load.rate == found)
    text = f"The highest rate that the server sustained (the knee) is {label}"
    if any((point.load.rate or 0) > found for point in rates):
        return text, "; it did not sustain the next one."
    return text, ". No higher rate was tried, so the knee may be higher."


def is_overloaded(points: Sequence[LoadMetrics]) -> bool:
    """Whether any load was not sustained."""
    return not all(map(is_sustained, points))


def next_rate(points: Sequence[LoadMetrics], *, first: float, factor: float) -> float | None:
    """Return the rate to try after `points`; None when the sweep is over.

    The rate grows by `factor` until a load is not sustained, then up to twice the knee, so that overload is measured
    too. Where the first rate is not sustained, it is halved until one is.
    """
    rates = [point.load.rate for point in points if point.load.rate]
    if not rates:
        return first
    if died(points) or len(rates) >= _MAX_RATES:
        return None
    sustained = knee(points)
    if sustained is None:
        return min(rates) / _DECREASE if len(rates) <= _MAX_DECREASES else None
    if not is_overloaded(points):
        return max(rates) * factor
    last = _PAST_KNEE * sustained
    following = max(rates) * factor
    if max(rates) >= last * 0.999:
        return None
    return last if following > last * 0.9 else following  # avoids two rates next to each other
