"""Comparison with an earlier run: ratios of metrics, with bootstrap intervals. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from loadtest.analysis.results import ComparedMetric, MeasuredLoad, service_window

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]  # of blocks

MARGIN = 0.05  # of relative change that is tolerated
_LEVEL = 99  # per cent of resampled ratios within the interval: a run compares many metrics
_RESAMPLES = 1000
# Consecutive latencies are correlated, so blocks of time are resampled, not requests (block bootstrap). Each is at
# least two latencies long, or one burst would be counted as several; too few blocks give no interval.
_MAX_BLOCKS, _MIN_BLOCKS = 20, 5
_MIN_REQUESTS = {50: 20, 95: 100, 99: 500}  # for a percentile: five requests beyond it


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A load's requests by block of time."""

    latencies: tuple[Floats, ...]  # of completed requests, by when they were due
    ended: Floats  # [blocks] completed per second, by when they ended
    good: Floats  # [blocks] completed within their latency target, by when they were due

    @property
    def completed(self) -> int:
        return sum(map(len, self.latencies))


Measure = Callable[[_Blocks, Indices], float]


def matches(
    before: Sequence[MeasuredLoad], after: Sequence[MeasuredLoad]
) -> Iterator[tuple[MeasuredLoad, MeasuredLoad]]:
    """Yield the pairs of loads that both runs have."""
    known = {_key(one): one for one in before}
    yield from ((known[_key(one)], one) for one in after if _key(one) in known)


def compare(before: Sequence[MeasuredLoad], after: Sequence[MeasuredLoad], *, seed: int = 0) -> list[ComparedMetric]:
    """Compare throughput, goodput and latency percentiles of every load that both runs have, where data suffices.

    The runs are resampled independently even where their requests are the same, because pairing them would take what
    affects one run as a whole for a difference.
    """
    return [line for earlier, later in matches(before, after) for line in _compare_load(earlier, later, seed=seed)]


def too_short(before: MeasuredLoad, after: MeasuredLoad) -> bool:
    """Whether the loads are too short, relative to their latencies, to compare latencies."""
    return _block_count(before, after) < _MIN_BLOCKS


def _key(measured: MeasuredLoad) -> str:
    return measured.point.load.label


def _block_count(*runs: MeasuredLoad) -> int:
    waits = [one.point.latency.p95 for one in runs if one.point.latency]
    shortest = min(one.point.load.seconds for one in runs)
    return min(int(shortest / (2 * max(waits))), _MAX_BLOCKS) if waits else _MAX_BLOCKS


def _compare_load(before: MeasuredLoad, after: MeasuredLoad, *, seed: int) -> Iterator[ComparedMetric]:
    blocks = _block_count(before, after)
    done, was_done = _split(after, _MAX_BLOCKS), _split(before, _MAX_BLOCKS)
    if was_done.ended.sum():
        ratios = _resample(_throughput, done, was_done, seed)
        whole = np.arange(_MAX_BLOCKS)
        values = _throughput(was_done, whole), _throughput(done, whole)
        yield _compared(after, "throughput", values, ratios, more_is_better=True)
    if blocks < _MIN_BLOCKS:
        return
    new, old = _split(after, blocks), _split(before, blocks)
    if old.good.sum():
        values = before.point.goodput, after.point.goodput
        yield _compared(after, "goodput", values, _resample(_goodput, new, old, seed), more_is_better=True)
    for q, enough in _MIN_REQUESTS.items():
        if min(new.completed, old.completed) >= enough:
            measure = partial(_percentile, q=q)
            whole = np.arange(blocks)
            values = measure(old, whole), measure(new, whole)
            yield _compared(after, f"p{q}", values, _resample(measure, new, old, seed), more_is_better=False)


def _compared(
    after: MeasuredLoad, figure: str, values: tuple[float, float], ratios: Floats, *, more_is_better: bool
) -> ComparedMetric:
    old, new = values
    low, high = (float(np.percentile(ratios, q)) for q in ((100 - _LEVEL) / 2, (100 + _LEVEL) / 2))
    return ComparedMetric(
        load=_key(after),
        figure=figure,
        before=old,
        after=new,
        ratio=_ratio(new, old),
        low=low,
        high=high,
        regressed=high < 1 - MARGIN if more_is_better else low > 1 + MARGIN,
    )


def _resample(measure: Measure, new: _Blocks, old: _Blocks, seed: int) -> Floats:
    """Return [resamples] ratios of the metric over blocks drawn with replacement from both runs."""
    rng, count = np.random.default_rng(seed), len(new.ended)
    picks = rng.integers(count, size=(_RESAMPLES, 2, count))
    return np.array([_ratio(measure(new, mine), measure(old, theirs)) for mine, theirs in picks])


def _throughput(blocks: _Blocks, pick: Indices) -> float:
    return float(blocks.ended[pick].mean())


def _goodput(blocks: _Blocks, pick: Indices) -> float:
    return float(blocks.good[pick].mean())


def _ratio(new: float, old: float) -> float:
    """Return new / old; 1 if both are 0, and a large finite number if only `old` is."""
    return new / old if old > 0 else (1.0 if new == 0 else 1e6)


def _percentile(blocks: _Blocks, pick: Indices, *, q: float) -> float:
    drawn = np.concatenate([blocks.latencies[index] for index in pick])
    return float(np.percentile(drawn, q)) if len(drawn) else 0.0


def _split(measured: MeasuredLoad, blocks: int) -> _Blocks:
    load = measured.point.load
    counted = [one for one in measured.requests if one.outcome == "completed" and one.counted]
    service_began, service_seconds = service_window(load, measured.requests)

    def block(at: float, began: float = load.warm_up, seconds: float = load.seconds) -> int:
        return min(max(int((at - began) / seconds * blocks), 0), blocks - 1)

    latencies: list[list[float]] = [[] for _ in range(blocks)]
    good, ended = np.zeros(blocks), np.zeros(blocks)
    for one in counted:
        latencies[block(one.due)].append(one.latency)
        good[block(one.due)] += one.latency <= one.latency_target
        ended[block(one.ended, service_began, service_seconds)] += blocks / service_seconds
    return _Blocks(tuple(np.array(each) for each in latencies), ended, good)
