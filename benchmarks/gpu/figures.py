"""What is measured, as it is kept: raw values, and the numbers that follow from them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from loadtest.provenance import ResultModel
from loadtest.statistics import Spread, goodput, percentile

Policy = Literal["by step", "by request"]
POLICIES: tuple[Policy, ...] = ("by step", "by request")


class Summary(ResultModel):
    """Too many measurements to keep each, seconds."""

    count: int
    p5: float
    median: float
    p95: float


class Peak(ResultModel):
    """The largest rate of matrix products that was seen."""

    flops: float  # per second
    side: int  # of the square matrices
    dtype: str


class Latencies(ResultModel):
    """One picture at a time, from asking for it to having its pixels."""

    precision: str
    first: float  # seconds of the first picture, with all that is done but once; not in the others
    by_steps: dict[int, Spread]
    broken: int = 0  # pictures that were not finite, as random weights may have it; they take as long


class Built(ResultModel):
    """The bundle that is measured."""

    precision: str
    rows: tuple[int, ...]
    size: str
    kept: bool  # it was there already


class Full(ResultModel):
    """The pipeline kept full at one number of rows."""

    rows: int
    images: int
    images_per_second: float
    step: Summary | None  # on the device, of steps that were full
    step_beside_decode: Summary | None  # those of them during which something was decoded
    step_alone: Summary | None  # the others
    idle_share: float | None  # of the device, between steps
    host_per_step: float | None  # seconds of the executor's work; None where the host is the device
    waiting_share: float | None  # of the time: the host waited for the device


class Rows(ResultModel):
    """What more rows in a step bring."""

    steps: int  # of each picture
    points: tuple[Full, ...]
    curve: dict[int, float]  # seconds of a step by rows, as the server keeps them
    left_out: tuple[int, ...] = ()  # row counts for which no time was left
    broken: int = 0

    def at(self, rows: int) -> Full | None:
        return next((point for point in self.points if point.rows == rows), None)

    def step_seconds(self, rows: int) -> float | None:
        """Of a full step: on the device where that is known, or else as the server saw it."""
        point = self.at(rows)
        return point.step.median if point and point.step else self.curve.get(rows)


class Load(ResultModel):
    """The same callers, served by both policies."""

    share: float  # of the saturated throughput
    rate: float  # callers per second
    seconds: float  # in which they come
    steps: tuple[int, ...]  # of each
    latencies: dict[Policy, tuple[float, ...]]  # of each, seconds from when it was due to come


class Serving(ResultModel):
    """Continuous beside request-level batching, under callers who do not wait for each other."""

    rows: int
    capacity: float  # pictures per second, saturated, of the same mix of steps
    unloaded: dict[int, float]  # seconds of a picture by steps, alone
    slo: float  # what a caller accepts, as a multiple of that
    seed: int
    loads: tuple[Load, ...]
    broken: int = 0

    def percentile(self, load: Load, policy: Policy, q: float) -> float:
        return percentile(load.latencies[policy], q)

    def goodput(self, load: Load, policy: Policy) -> float:
        """Pictures per second that came within what their callers accept."""
        accepted = [self.slo * alone(self.unloaded, steps) for steps in load.steps]
        return goodput(load.latencies[policy], accepted, seconds=load.seconds)


class Decoding(ResultModel):
    """Pictures per second when full, decoded while others step, and between their steps."""

    rows: int
    beside: float
    between: float
    broken: int = 0


Figures = Peak | Latencies | Built | Rows | Serving | Decoding


def summary(seconds: Sequence[float]) -> Summary | None:
    """None where there is nothing to sum up."""
    if not seconds:
        return None
    p5, median, p95 = (percentile(seconds, q) for q in (5, 50, 95))
    return Summary(count=len(seconds), p5=p5, median=median, p95=p95)


def alone(unloaded: Mapping[int, float], steps: int) -> float:
    """Seconds that a picture takes on its own: on the line through those that were measured."""
    counts, seconds = zip(*sorted(unloaded.items()), strict=True)
    return float(np.interp(steps, counts, seconds))


def rate(moments: Sequence[float]) -> float:
    """Per second, from when the first was done to when the last was; 0 where that cannot be told."""
    span = moments[-1] - moments[0] if moments else 0.0
    return (len(moments) - 1) / span if span else 0.0
