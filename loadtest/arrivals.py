"""Poisson arrivals for an open loop, in which requests do not wait for each other's images. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when it arrives, in seconds after the start, and its number of steps."""

    at: float
    steps: int


def poisson(*, rate: float, seconds: float, steps: tuple[int, int], seed: int) -> tuple[Arrival, ...]:
    """Return a Poisson process of `rate` requests per second, with steps uniform over `steps`, both ends included.

    The same seed gives the same requests at every rate, only closer together, so that loads differ in nothing else.
    """
    dice = np.random.default_rng(seed)
    arrivals: list[Arrival] = []
    at = dice.exponential() / rate
    while at < seconds:
        arrivals.append(Arrival(float(at), int(dice.integers(*steps, endpoint=True))))
        at += dice.exponential() / rate
    return tuple(arrivals)
