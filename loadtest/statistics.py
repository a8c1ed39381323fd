"""Repeated measurements and what follows from them. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from loadtest.provenance import Fact


class Spread(Fact):
    """Repeated measurements, seconds, in the order in which they were made."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)


def percentile(values: Sequence[float], q: float) -> float:
    """The `q`th percentile, on a line between the two values beside it."""
    return float(np.percentile(values, q))


def goodput(latencies: Iterable[float], accepted: Iterable[float], *, seconds: float) -> float:
    """Per second, those whose latency is at most what they accept."""
    return sum(latency <= most for latency, most in zip(latencies, accepted, strict=True)) / seconds
