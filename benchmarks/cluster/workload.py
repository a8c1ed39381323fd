"""What arrives at a cluster: when, and how much work each request is. Pure; the same seed gives the same requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.cluster.curve import StepCurve

Pattern = Literal["poisson", "bursty"]
Rate = Callable[[float], float]  # requests per second, by the time

BURST_FACTOR = 1.5  # times the mean rate, in a burst; as much less between bursts
BURST_SECONDS = 10.0  # the length of a burst, and of the pause before the next


class RequestKind(NamedTuple):
    """What a request asks for; guided, so that an image takes two rows."""

    weight: float
    steps: int
    images: int

    @property
    def rows(self) -> int:
        return 2 * self.images


MIX = (
    RequestKind(0.50, steps=20, images=1),
    RequestKind(0.25, steps=30, images=1),
    RequestKind(0.15, steps=30, images=4),
    RequestKind(0.10, steps=50, images=2),
)
ALIKE = (RequestKind(1.0, steps=30, images=1),)


@dataclass(frozen=True, slots=True)
class Workload:
    """The requests of one run: when each arrives, in order, and the index of its kind in `mix`."""

    mix: tuple[RequestKind, ...]
    at: NDArray[np.float64]  # [n] seconds
    kind: NDArray[np.intp]  # [n]


def capacity(curve: StepCurve, mix: tuple[RequestKind, ...]) -> float:
    """Requests per second of one server whose steps are always full: a load of 1."""
    weights = sum(kind.weight for kind in mix)
    seconds = sum(kind.weight * curve.full(rows=kind.rows, steps=kind.steps, images=kind.images) for kind in mix)
    return weights / seconds


def arrivals(rate: Rate, *, peak: float, seconds: float, seed: int, mix: tuple[RequestKind, ...] = MIX) -> Workload:
    """A Poisson process of `rate`, which never exceeds `peak`, for `seconds`, by thinning (Lewis & Shedler, 1979)."""
    dice = np.random.default_rng(seed)
    expected = peak * seconds
    gaps = dice.exponential(1 / peak, int(expected + 6 * expected**0.5 + 10))
    at = np.cumsum(gaps)
    at = at[at < seconds]
    kept = dice.random(len(at)) * peak < np.array([rate(moment) for moment in at])
    weights = np.array([kind.weight for kind in mix])
    return Workload(mix, at[kept], dice.choice(len(mix), int(kept.sum()), p=weights / weights.sum()))


def steady(mean: float, *, seconds: float, seed: int, mix: tuple[RequestKind, ...] = MIX) -> Workload:
    """Poisson arrivals at `mean` requests per second."""
    return arrivals(lambda _at: mean, peak=mean, seconds=seconds, seed=seed, mix=mix)


def bursty(mean: float, *, seconds: float, seed: int, mix: tuple[RequestKind, ...] = MIX) -> Workload:
    """Poisson arrivals whose rate alternates between pauses and bursts, for all servers at once."""

    def rate(at: float) -> float:
        return mean * (BURST_FACTOR if at // BURST_SECONDS % 2 else 2 - BURST_FACTOR)

    return arrivals(rate, peak=mean * BURST_FACTOR, seconds=seconds, seed=seed, mix=mix)


def rising(before: float, after: float, *, begin: float, end: float, seconds: float, seed: int) -> Workload:
    """Poisson arrivals whose rate rises in a straight line from `before`, at `begin`, to `after`, at `end`."""

    def rate(at: float) -> float:
        return float(np.interp(at, (begin, end), (before, after)))

    return arrivals(rate, peak=max(before, after), seconds=seconds, seed=seed)
