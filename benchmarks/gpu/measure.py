"""Measures the server on a device: single images, full steps, requests that arrive at random, decodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import get_args

import numpy as np

from benchmarks import models
from benchmarks.gpu.bench import Budget
from benchmarks.gpu.figures import (
    POLICIES,
    Decoding,
    FullSteps,
    Latencies,
    Rows,
    ServedLoad,
    Serving,
    quantiles,
    rate,
)
from benchmarks.gpu.options import GpuBenchCommand
from benchmarks.inprocess import Saturated, Served
from benchmarks.lora.results import TimedSteps
from benchmarks.lora.steps import Steps, capacity_of, cases_of, time_steps
from benchmarks.models import BenchmarkModel
from benchmarks.spans import (
    STEPS,
    TraceSpan,
    by_overlap,
    host_per_step,
    idle_share,
    inside,
    rows_of,
    steps_in,
    waiting_share,
)
from engines.backends.available import precision_of
from loadtest.analysis.statistics import Spread
from loadtest.arrivals import Arrival, poisson
from server.runtime.pipeline.streams import DecodePriority

_LORAS, _RANKS, _ROUNDS = (1, 4, 8), (4, 16, 32, 64), 3


def measure_single(session: Served, options: GpuBenchCommand, backend: str) -> Latencies:
    """One guided image at a time, from submitting it to its completion."""
    broken = session.broken
    first = session.draw(min(options.steps))
    by_steps = {
        steps: Spread(values=tuple(session.draw(steps) for _ in range(options.runs))) for steps in options.steps
    }
    return Latencies(
        precision=precision_of(session.manifest, backend),
        first=first,
        by_steps=by_steps,
        broken=session.broken - broken,
    )


def measure_rows(session: Served, options: GpuBenchCommand, budget: Budget, *, on_host: bool) -> Rows:
    """The pipeline kept full in a closed loop, at each number of rows."""
    broken, steps = session.broken, min(options.steps)
    filled: dict[int, Saturated] = {}
    wanted = [rows for rows in options.rows if rows <= session.manifest.max_rows]
    for rows in wanted:
        if not filled or budget.fits(options.seconds * 1.5):
            filled[rows] = session.saturate(rows, repeat(steps), seconds=options.seconds)
    spans = session.take_spans()
    return Rows(
        steps=steps,
        points=tuple(_full(rows, saturated, spans, on_host=on_host) for rows, saturated in filled.items()),
        curve=dict(session.step_times.curves()[session.manifest.resolutions[0], "full"]),
        left_out=tuple(rows for rows in wanted if rows not in filled),
        broken=session.broken - broken,
    )


def _full(rows: int, saturated: Saturated, spans: Sequence[TraceSpan], *, on_host: bool) -> FullSteps:
    """What the trace says of the time in which steps had `rows`. No host times where the host is the device."""
    seen = inside(spans, saturated.window)
    alone, overlapping = by_overlap([span for span in seen if span.track != STEPS or rows_of(span) == rows])
    return FullSteps(
        rows=rows,
        images=len(saturated.moments),
        images_per_second=rate(saturated.moments),
        step=quantiles([*alone, *overlapping]),
        step_alone=quantiles(alone),
        step_overlapping_decode=quantiles(overlapping),
        idle_share=idle_share(steps_in(seen)),
        host_per_step=None if on_host else host_per_step(seen),
        waiting_share=None if on_host else waiting_share(seen, saturated.window),
    )


def measure_serving(session: Served, options: GpuBenchCommand) -> Serving:
    """The same random arrivals, batched by step and by request."""
    broken, rows = session.broken, min(options.serve_rows, session.manifest.max_rows)
    session.draw(min(options.mix))
    unloaded = {steps: float(np.median([session.draw(steps) for _ in range(3)])) for steps in options.mix}
    full = session.saturate(rows, _mixed(options), seconds=options.serve_seconds)
    capacity = rate(full.moments)
    return Serving(
        rows=rows,
        capacity=capacity,
        unloaded=unloaded,
        slo=options.slo,
        seed=options.seed,
        loads=tuple(_load(session, options, share, rows=rows, capacity=capacity) for share in options.load_shares),
        broken=session.broken - broken,
    )


def measure_decoding(model: BenchmarkModel, backend: str, options: GpuBenchCommand) -> Decoding:
    """The pipeline full at the most rows, with each way of sharing the device between steps and decodes."""
    found: dict[DecodePriority, float] = {}
    rows = broken = 0
    for priority in get_args(DecodePriority):
        with Served(model.bundle, backend, threads=options.threads, decode_priority=priority) as session:
            rows = min(max(options.rows), session.manifest.max_rows)
            full = session.saturate(rows, repeat(min(options.steps)), seconds=options.seconds)
            found[priority] = rate(full.moments)
            broken += session.broken
    return Decoding(rows=rows, rates=found, broken=broken)


def measure_loras(model: BenchmarkModel, backend: str, options: GpuBenchCommand) -> TimedSteps:
    """Steps of guided images without LoRAs, and with one, four and eight, in turns; the bundle is built for it."""
    subject = models.with_loras(model)
    manifest = models.build(subject, backend, options.rows, lora=models.LORA_CAPACITY)
    images = max(min(options.serve_rows, manifest.max_rows) // 2, 1)
    steps = Steps(subject.bundle, backend, size=manifest.resolutions[0], images=images, threads=options.threads)
    cases = cases_of(capacity_of(manifest), loras=_LORAS, ranks=_RANKS, images=images)
    return time_steps(steps, backend, cases, rounds=_ROUNDS, count=options.runs)


def _mixed(options: GpuBenchCommand) -> Iterator[int]:
    """Step counts of one request after another, without end."""
    rng = np.random.default_rng(options.seed)
    while True:
        yield int(rng.integers(*options.mix, endpoint=True))


def _load(session: Served, options: GpuBenchCommand, share: float, *, rows: int, capacity: float) -> ServedLoad:
    per_second, seconds = share * capacity, options.serve_seconds
    arrivals = poisson(rate=per_second, seconds=seconds, steps=options.mix, seed=options.seed) or (
        Arrival(0.0, min(options.mix)),
    )
    latencies = {policy: session.replay(arrivals, rows=rows, by_request=policy == "by request") for policy in POLICIES}
    return ServedLoad(
        share=share,
        rate=per_second,
        seconds=seconds,
        steps=tuple(arrival.steps for arrival in arrivals),
        latencies=latencies,
    )
