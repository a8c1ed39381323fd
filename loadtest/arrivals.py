"""Who comes when: an open loop, in which callers do not wait for each other's pictures. Pure numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Arrival:
    """One caller: seconds after the start, and what is asked for."""

    at: float
    steps: int


def poisson(*, rate: float, seconds: float, steps: tuple[int, int], seed: int) -> tuple[Arrival, ...]:
    """A Poisson process of `rate` callers per second, each wanting steps drawn evenly from `steps`, both ends included.

    The same seed gives the same callers at every rate, only closer together: so loads differ in nothing else.
    """
    dice = np.random.default_rng(seed)
    arrivals: list[Arrival] = []
    at = dice.exponential() / rate
    while at < seconds:
        arrivals.append(Arrival(float(at), int(dice.integers(*steps, endpoint=True))))
        at += dice.exponential() / rate
    return tuple(arrivals)
