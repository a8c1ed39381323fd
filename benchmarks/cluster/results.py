"""The results file of the simulation, and the figures that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from benchmarks.cluster.autoscaler import Scaling
from benchmarks.cluster.balancers import BalancerName
from benchmarks.cluster.cluster import ENDINGS, ClusterRun
from benchmarks.cluster.curve import StepCurve
from benchmarks.cluster.workload import Pattern, RequestKind
from loadtest.provenance import ResultModel, Run

LIMIT = 4.0  # times the latency of an idle server: the load test's target of latency, and what p99 breaks at


class SeedFigures(ResultModel):
    """One run of the simulation, with one seed. Requests that got no image count as infinitely slow."""

    seed: int
    requests: int
    refused: int
    lost: int
    median: float | None = Field(description="times the latency of an idle server; None: no image")
    p99: float | None = Field(description="likewise")
    p99_seconds: float | None
    good: float = Field(description=f"the part of requests within {LIMIT:g} times the latency of an idle server")
    open: float = Field(description="requests that wait or run at a server, on average")


class LoadPoint(ResultModel):
    """A cluster under a steady mean load, of which 1 keeps the steps of every server full."""

    size: int
    balancer: BalancerName
    pattern: Pattern
    load: float
    runs: tuple[SeedFigures, ...]


class LossPoint(ResultModel):
    """The minute after some servers died at once; none takes their place."""

    size: int
    lost_servers: int
    unnoticed: float = Field(description="seconds until the balancer sends them nothing more")
    load: float = Field(description="before")
    runs: tuple[SeedFigures, ...]


class ScalingPoint(ResultModel):
    """A load that doubles, and an autoscaler that follows."""

    scaling: Scaling
    rise: float = Field(description="seconds in which the load doubles")
    runs: tuple[SeedFigures, ...] = Field(description="of requests from the begin of the rise on")
    servers: float = Field(description="in rotation, on average")


class SimulationResults(ResultModel):
    """The results file."""

    run: Run
    curve: StepCurve
    mix: tuple[RequestKind, ...]
    capacity: float = Field(description="requests per second of a server at a load of 1")
    loads: tuple[LoadPoint, ...]
    losses: tuple[LossPoint, ...]
    scaling: tuple[ScalingPoint, ...]


class Break(ResultModel):
    """The load at which p99 exceeds the limit: the mean of all seeds, and the least and the greatest."""

    mean: float
    low: float
    high: float


def figures(run: ClusterRun, *, seed: int, size: int, begin: float, end: float) -> SeedFigures:
    """The figures of the requests that arrived from `begin` to `end`, seconds."""
    counted = (run.workload.at >= begin) & (run.workload.at < end)
    ending, slowdown, latency = run.ending[counted], run.slowdown[counted], run.latency[counted]
    done = latency[np.isfinite(latency)]
    return SeedFigures(
        seed=seed,
        requests=len(ending),
        refused=int((ending == ENDINGS.index("refused")).sum()),
        lost=int((ending == ENDINGS.index("lost")).sum()),
        median=_percentile(slowdown, 50),
        p99=_percentile(slowdown, 99),
        p99_seconds=_percentile(latency, 99),
        good=float((slowdown <= LIMIT).mean()),
        open=float(done.sum() / (end - begin) / size),  # Little's law
    )


def mean_p99(runs: Sequence[SeedFigures]) -> float | None:
    """The mean of all seeds; None where a request in a hundred got no image."""
    found = [run.p99 for run in runs if run.p99 is not None]
    return float(np.mean(found)) if len(found) == len(runs) else None


def break_load(points: Sequence[tuple[float, Sequence[SeedFigures]]]) -> Break | None:
    """Where p99 crosses the limit, of `points` in order of their loads; None where it does for no seed within them."""
    seeds = range(len(points[0][1]))
    found = [_crossing([(load, runs[seed].p99) for load, runs in points]) for seed in seeds]
    loads = [load for load in found if load is not None]
    return Break(mean=float(np.mean(loads)), low=min(loads), high=max(loads)) if len(loads) == len(found) else None


def _crossing(curve: Sequence[tuple[float, float | None]]) -> float | None:
    """The load at which a straight line between two points crosses the limit, the last time."""
    for (low, before), (high, after) in reversed(list(pairwise(curve))):
        if before is not None and before <= LIMIT and (after is None or after > LIMIT):
            return high if after is None else low + (high - low) * (LIMIT - before) / (after - before)
    return None


def _percentile(values: NDArray[np.float64], percent: float) -> float | None:
    """The value that so many per cent of `values` do not exceed; None where that is infinite."""
    if not len(values):
        return None
    found = float(np.percentile(values, percent, method="higher"))
    return found if np.isfinite(found) else None
