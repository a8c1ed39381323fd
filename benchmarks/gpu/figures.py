"""Measurements of the GPU benchmark: raw values, and the numbers that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from benchmarks.lora.results import TimedSteps
from loadtest.analysis.statistics import Spread, goodput, percentile
from loadtest.provenance import ResultModel
from server.runtime.pipeline.streams import DecodePriority

Policy = Literal["by step", "by request"]
POLICIES: tuple[Policy, ...] = ("by step", "by request")


class Quantiles(ResultModel):
    """Quantiles of many measurements, seconds."""

    count: int
    p5: float
    median: float
    p95: float


class Peak(ResultModel):
    """The highest rate of matrix products that was reached."""

    flops: float  # per second
    side: int  # of the square matrices
    dtype: str


class Latencies(ResultModel):
    """One image at a time, from the request to its pixels."""

    precision: str
    first: float  # seconds of the first image, which includes one-time work; not part of by_steps
    by_steps: dict[int, Spread]
    broken: int = 0  # images that were not finite, which random weights may cause; they take as long


class Batch(ResultModel):
    """Several images at a time in one call of PyTorch's pipeline."""

    precision: str
    rows: int  # of the UNet: two for each image
    steps: int
    seconds: Spread  # of a call
    first: float  # seconds of the first call, which compiles
    mode: str  # of torch.compile; empty if eager

    @property
    def images_per_second(self) -> float:
        return self.rows / 2 / self.seconds.median


class Built(ResultModel):
    """The bundle that is measured."""

    precision: str
    rows: tuple[int, ...]
    size: str
    kept: bool  # it existed already


class FullSteps(ResultModel):
    """The pipeline kept full at one number of rows."""

    rows: int
    images: int
    images_per_second: float
    step: Quantiles | None  # on the device, of steps that were full
    step_overlapping_decode: Quantiles | None  # steps that overlapped a decode
    step_alone: Quantiles | None  # the others
    idle_share: float | None  # of the device, between steps
    host_per_step: float | None  # seconds of the executor's work; None where the host is the device
    waiting_share: float | None  # of the time, in which the host waited for the device


class Rows(ResultModel):
    """Throughput by rows in a step."""

    steps: int  # of each image
    points: tuple[FullSteps, ...]
    curve: dict[int, float]  # seconds of a step by rows, as the server keeps them
    left_out: tuple[int, ...] = ()  # rows not measured for lack of time
    broken: int = 0

    def at(self, rows: int) -> FullSteps | None:
        return next((point for point in self.points if point.rows == rows), None)

    def step_seconds(self, rows: int) -> float | None:
        """Duration of a full step: on the device if traced, or else as the server measured it."""
        point = self.at(rows)
        return point.step.median if point and point.step else self.curve.get(rows)


class ServedLoad(ResultModel):
    """The same requests, served under both batching policies."""

    share: float  # of the saturated throughput
    rate: float  # requests per second
    seconds: float  # in which they arrive
    steps: tuple[int, ...]  # of each
    latencies: dict[Policy, tuple[float, ...]]  # of each, seconds from its arrival


class Serving(ResultModel):
    """Continuous compared with request-level batching, in an open loop."""

    rows: int
    capacity: float  # images per second, saturated, of the same mix of steps
    unloaded: dict[int, float]  # seconds of an image by steps, on the idle server
    slo: float  # latency target, as a multiple of unloaded
    seed: int
    loads: tuple[ServedLoad, ...]
    broken: int = 0

    def percentile(self, load: ServedLoad, policy: Policy, q: float) -> float:
        return percentile(load.latencies[policy], q)

    def goodput(self, load: ServedLoad, policy: Policy) -> float:
        """Images per second within the latency target."""
        accepted = [self.slo * alone(self.unloaded, steps) for steps in load.steps]
        return goodput(load.latencies[policy], accepted, seconds=load.seconds)


class Decoding(ResultModel):
    """Images per second when full, by how decodes share the device with steps."""

    rows: int
    rates: dict[DecodePriority, float]
    broken: int = 0


Figures = Peak | Latencies | Batch | Built | Rows | Serving | Decoding | TimedSteps


def quantiles(seconds: Sequence[float]) -> Quantiles | None:
    """None if there are no values."""
    if not seconds:
        return None
    p5, median, p95 = (percentile(seconds, q) for q in (5, 50, 95))
    return Quantiles(count=len(seconds), p5=p5, median=median, p95=p95)


def alone(unloaded: Mapping[int, float], steps: int) -> float:
    """Seconds of an image on the idle server, interpolated between measured step counts."""
    counts, seconds = zip(*sorted(unloaded.items()), strict=True)
    return float(np.interp(steps, counts, seconds))


def rate(moments: Sequence[float]) -> float:
    """Per second, from when the first was done to when the last was; 0 if there are too few."""
    span = moments[-1] - moments[0] if moments else 0.0
    return (len(moments) - 1) / span if span else 0.0
