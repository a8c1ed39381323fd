"""Where a node breaks: which loads it holds, and which rate to try next. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.results import Point

_BEHIND = 0.9  # of the offered load: less goodput does not hold it
_EXPLODED = 10.0  # times the idle latency, at the 99th percentile
_BEYOND = 2.0  # times the knee: where a sweep ends
_MOST = 20  # rates, whatever is found
_DOWN = 2.0  # by this the rate falls while nothing held yet,
_FALLS = 6  # so often at most


def holds(point: Point) -> bool:
    """Whether nearly all that was asked came in time, and nobody waited without measure. Not, if nobody came."""
    explodes = point.slowdown is None or point.slowdown > _EXPLODED
    return point.goodput >= _BEHIND * point.offered and not explodes


def knee(points: Sequence[Point]) -> float | None:
    """The highest rate that held with all rates below it; None if the lowest did not."""
    found = None
    for point in sorted((one for one in points if one.load.rate), key=lambda one: one.load.rate or 0.0):
        if not holds(point):
            break
        found = point.load.rate
    return found


def breaks(points: Sequence[Point]) -> bool:
    return not all(map(holds, points))


def next_rate(points: Sequence[Point], *, first: float, factor: float) -> float | None:
    """The rate to try after `points`; None when the sweep is over.

    It grows by `factor` until a load does not hold, and on to twice the knee, so that what lies beyond is seen too.
    Where the first already breaks, it falls until one holds.
    """
    rates = [point.load.rate for point in points if point.load.rate]
    if not rates:
        return first
    if len(rates) >= _MOST:
        return None
    held = knee(points)
    if held is None:
        return min(rates) / _DOWN if len(rates) <= _FALLS else None
    if not breaks(points):
        return max(rates) * factor
    last = _BEYOND * held
    following = max(rates) * factor
    if max(rates) >= last * 0.999:
        return None
    return last if following > last * 0.9 else following  # not two that are next to the same
