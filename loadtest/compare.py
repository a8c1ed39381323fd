"""A run beside an earlier one: ratios, and how far chance alone would move them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from loadtest.results import Compared, Measured

Floats = NDArray[np.float64]
Pick = NDArray[np.int64]  # indices of stretches

MARGIN = 0.05  # of change that nobody minds
_LEVEL = 99  # per cent of the resampled ratios lie in the interval: a run compares many figures
_RESAMPLED = 1000
# Latencies that follow each other are alike, so whole stretches of time are resampled, not requests: at most so many,
# and each as long as two waits, or a single crowd would be counted as several. Fewer than the least tell nothing.
_MOST, _LEAST = 20, 5
_ENOUGH = {50: 20, 95: 100, 99: 500}  # requests, for a percentile to say something: five beyond it


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A load cut into stretches of time."""

    latencies: tuple[Floats, ...]  # of the completed, by when they were due
    ended: Floats  # [blocks] completions
    good: Floats  # [blocks] of them in time, by when they were due

    @property
    def completed(self) -> int:
        return sum(map(len, self.latencies))


Measure = Callable[[_Blocks, Pick], float]


def matches(before: Sequence[Measured], after: Sequence[Measured]) -> Iterator[tuple[Measured, Measured]]:
    """The loads that both runs had."""
    known = {_key(one): one for one in before}
    yield from ((known[_key(one)], one) for one in after if _key(one) in known)


def compare(before: Sequence[Measured], after: Sequence[Measured], *, seed: int = 0) -> list[Compared]:
    """Throughput, goodput and percentiles of every load that both runs had, as far as they can be told.

    The runs are resampled apart, even where their callers were the same: what moves a run as a whole would else pass
    for a difference.
    """
    return [line for earlier, later in matches(before, after) for line in _figures(earlier, later, seed=seed)]


def too_short(before: Measured, after: Measured) -> bool:
    """Whether latencies cannot be compared: waits are so long that a load holds too few of them after each other."""
    return _stretches(before, after) < _LEAST


def _key(measured: Measured) -> str:
    return measured.point.load.label


def _stretches(*runs: Measured) -> int:
    waits = [one.point.latency.p95 for one in runs if one.point.latency]
    shortest = min(one.point.load.seconds for one in runs)
    return min(int(shortest / (2 * max(waits))), _MOST) if waits else _MOST


def _figures(before: Measured, after: Measured, *, seed: int) -> Iterator[Compared]:
    blocks = _stretches(before, after)
    done, was_done = _cut(after, _MOST), _cut(before, _MOST)
    if was_done.ended.sum():
        ratios = _resample(_throughput, done, was_done, seed)
        values = before.point.throughput, after.point.throughput
        yield _line(after, "throughput", values, ratios, more_is_better=True)
    if blocks < _LEAST:
        return
    new, old = _cut(after, blocks), _cut(before, blocks)
    if old.good.sum():
        values = before.point.goodput, after.point.goodput
        yield _line(after, "goodput", values, _resample(_goodput, new, old, seed), more_is_better=True)
    for q, enough in _ENOUGH.items():
        if min(new.completed, old.completed) >= enough:
            measure = partial(_percentile, q=q)
            whole = np.arange(blocks)
            values = measure(old, whole), measure(new, whole)
            yield _line(after, f"p{q}", values, _resample(measure, new, old, seed), more_is_better=False)


def _line(
    after: Measured, figure: str, values: tuple[float, float], ratios: Floats, *, more_is_better: bool
) -> Compared:
    old, new = values
    low, high = (float(np.percentile(ratios, q)) for q in ((100 - _LEVEL) / 2, (100 + _LEVEL) / 2))
    return Compared(
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
    """Ratios of what stretches drawn by chance from both come to."""
    dice, count = np.random.default_rng(seed), len(new.ended)
    picks = dice.integers(count, size=(_RESAMPLED, 2, count))
    return np.array([_ratio(measure(new, mine), measure(old, theirs)) for mine, theirs in picks])


def _throughput(blocks: _Blocks, pick: Pick) -> float:
    return float(blocks.ended[pick].mean())


def _goodput(blocks: _Blocks, pick: Pick) -> float:
    return float(blocks.good[pick].mean())


def _ratio(new: float, old: float) -> float:
    """1 where there is nothing on either side; a large number rather than none where there was nothing before."""
    return new / old if old > 0 else (1.0 if new == 0 else 1e6)


def _percentile(blocks: _Blocks, pick: Pick, *, q: float) -> float:
    drawn = np.concatenate([blocks.latencies[index] for index in pick])
    return float(np.percentile(drawn, q)) if len(drawn) else 0.0


def _cut(measured: Measured, blocks: int) -> _Blocks:
    load = measured.point.load
    completed = [one for one in measured.requests if one.outcome == "completed"]
    counted = [one for one in completed if one.counted]

    def block(at: float) -> int:
        return min(int((at - load.warm_up) / load.seconds * blocks), blocks - 1)

    latencies: list[list[float]] = [[] for _ in range(blocks)]
    good, ended = np.zeros(blocks), np.zeros(blocks)
    for one in counted:
        latencies[block(one.due)].append(one.latency)
        good[block(one.due)] += one.latency <= one.accepted
    for one in completed:
        if load.warm_up <= one.ended < load.end:
            ended[block(one.ended)] += 1
    return _Blocks(tuple(np.array(each) for each in latencies), ended, good)
