"""The autoscaler of a simulated cluster: a HorizontalPodAutoscaler, which KEDA makes too."""

from __future__ import annotations

import math
from collections import deque
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from benchmarks.cluster.cluster import Cluster
from benchmarks.cluster.curve import StepCurve
from loadtest.provenance import ResultModel

Signal = Literal["rows", "open", "waiting"]

_TOLERANCE = 0.1  # of the target, within which a HorizontalPodAutoscaler changes nothing


class Scaling(ResultModel):
    """The settings of an autoscaler, and how long a server takes to start."""

    signal: Signal = Field(
        description="what is divided by the target: the UNet rows per second of all steps, as a part of what a server "
        "computes whose steps are full; the requests that wait or run; or those that wait"
    )
    target: PositiveFloat = Field(description="of that for each server")
    start: NonNegativeFloat = Field(description="seconds from the decision until a server is ready")
    interval: PositiveFloat = Field(30.0, description="seconds between decisions: KEDA's pollingInterval")
    delay: PositiveFloat = Field(15.0, description="age of the metrics, seconds: Prometheus' scrape interval")
    stabilization: PositiveFloat = Field(300.0, description="seconds for which fewer servers must have been enough")
    shrink: float = Field(1.0, gt=0, le=1, description="the part of the servers that one decision may stop")
    least: PositiveInt = 2
    most: PositiveInt = 24


class Autoscaler:
    """Starts and drains servers of `cluster` while it runs."""

    def __init__(self, cluster: Cluster, scaling: Scaling, curve: StepCurve) -> None:
        self._cluster, self._scaling = cluster, scaling
        self._full = curve.max_rows / curve.step(curve.max_rows)  # rows per second
        self._served = 0
        self._starting = 0
        self._wanted: deque[int] = deque(maxlen=math.ceil(scaling.stabilization / scaling.interval))
        cluster.at(scaling.interval, self._read)

    def _read(self) -> None:
        now, scaling = self._cluster.now, self._scaling
        total = self._total()
        self._cluster.at(now + scaling.delay, lambda: self._decide(total))
        self._cluster.at(now + scaling.interval, self._read)

    def _total(self) -> float:
        """The metric, summed over all servers."""
        served, self._served = self._served, self._cluster.served
        match self._scaling.signal:
            case "rows":
                return (self._served - served) / self._scaling.interval / self._full
            case "open":
                return self._cluster.open
            case "waiting":
                return self._cluster.waiting

    def _decide(self, total: float) -> None:
        current = self._cluster.size + self._starting
        wanted = wanted_servers(total, current, self._scaling)
        self._wanted.append(wanted)
        for _ in range(wanted - current):
            self._starting += 1
            self._cluster.at(self._cluster.now + self._scaling.start, self._started)
        if len(self._wanted) == self._wanted.maxlen:
            self._shrink(current - max(self._wanted))

    def _shrink(self, surplus: int) -> None:
        """Drain the servers that were not needed for a while, as far as the policy allows."""
        allowed = max(int(self._cluster.size * self._scaling.shrink), 1)
        for _ in range(min(surplus, allowed, self._cluster.size - 1)):
            self._cluster.drain_server()

    def _started(self) -> None:
        self._starting -= 1
        self._cluster.start_server()


def wanted_servers(total: float, current: int, scaling: Scaling) -> int:
    """The servers for a metric of `total`, of an average value as a HorizontalPodAutoscaler computes it."""
    if abs(total / (current * scaling.target) - 1) <= _TOLERANCE:
        return current
    return min(max(math.ceil(total / scaling.target), scaling.least), scaling.most)
