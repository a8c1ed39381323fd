"""Statistics of repeated measurements. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from loadtest.provenance import ResultModel


class Spread(ResultModel):
    """Repeated measurements in seconds, in the order in which they were made."""

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
    """Return the `q`th percentile, interpolated linearly."""
    return float(np.percentile(values, q))


def goodput(latencies: Iterable[float], targets: Iterable[float], *, seconds: float) -> float:
    """Return how many latencies are within their targets, per second."""
    return sum(latency <= target for latency, target in zip(latencies, targets, strict=True)) / seconds
