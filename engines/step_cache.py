"""Where full steps are placed, of requests whose other steps reuse the deep features of the last full one.

A shallow step errs by what the model's output has drifted since the features were made. This moves x by the step's
coefficient of that output, and by those of later steps that read it in the scheduler's memory: solvers of higher order
extrapolate from the differences of outputs. Full steps are placed where the sum of the squares of these moves is least
over all shallow steps. What moves x in the last step counts thrice: no later one makes up for a part of it. Where
several steps at the end have little noise left, the first of them is full, so that none of them reuses features of
noisier steps, which would change the colours of whole backgrounds.

With fresh noise at each step features change at every step alike, and full steps are even. Where a solver extrapolates
either with fresh noise or over the last step, the last three are full besides: otherwise what the outputs differ by for
being computed in unlike ways is multiplied just before the end, which changes the colours of whole images.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engines.manifest import FeatureDrift
from engines.schedulers import Table

Vector = NDArray[np.float64]

_X, _MODEL = 0, 1  # the lane, and the term, of a step's matrix
_MEMORY = slice(3, None)  # terms
_LAST = 3.0  # how much more the last step counts: of 1 to 3, with which the demo's images changed least
_AT_END = 3  # full steps
_LITTLE_NOISE = 2.9  # log SNR: features from 2.6 on still changed the demo's images, those from 2.9 on did not
_MUCH = 0.1  # of a finished latent, whose deviation is about 1

# Of the demo model, by `python -m engines.build.feature_drift`; for bundles that have none of their own.
_DEMO = (  # log SNR and total
    (-4.6884, 0.0),
    (-3.2628, 0.273),
    (-2.0884, 0.4144),
    (-1.0835, 0.5209),
    (-0.1532, 0.6339),
    (0.8312, 0.7573),
    (2.2015, 0.9388),
)
DEMO_DRIFT = FeatureDrift(log_snr=tuple(x for x, _ in _DEMO), total=tuple(y for _, y in _DEMO))


@lru_cache(maxsize=256)
def full_steps(table: Table, count: int, drift: FeatureDrift) -> tuple[int, ...]:
    """The UNet calls of `table` that are computed in full, if `count` of them are; the first is always one."""
    calls = len(table.steps)
    if not 1 <= count <= calls:
        raise ValueError(f"{count} full steps of {calls}: choose 1 to {calls}")
    end = calls - min(_AT_END if extrapolates(table) else 0, count - 1)
    others = count - (calls - end)
    if table.draws:
        placed = tuple(-(-number * end // others) for number in range(others))
    else:
        placed = _least_error(table, drift, end=end, count=others)
    return (*placed, *range(end, calls))


@lru_cache(maxsize=256)
def extrapolates(table: Table) -> bool:
    """Whether differences of the model's outputs are multiplied with fresh noise, or over the last step.

    Not where the last step reads older outputs than would be full at the end, as that of LMS does: full ones and others
    would still be mixed, and be fewer elsewhere.
    """
    moves = _moves(table)
    if table.draws:
        return bool(np.tril(moves, -1).any())
    earlier, older = np.abs(moves[-1, -_AT_END:-1]), moves[-1, :-_AT_END]
    return bool(earlier.max(initial=0) > _MUCH and not older.any())


@lru_cache(maxsize=256)
def is_sensitive(table: Table) -> bool:
    """Whether small differences of outputs change images: a solver extrapolates, or moves x far by earlier outputs."""
    from_memory = np.abs(np.tril(_moves(table), -1)).sum(axis=1).max()
    return extrapolates(table) or bool(from_memory > 1)


@lru_cache(maxsize=256)
def step_size(table: Table) -> float:
    """How far calls are apart in log SNR, in median; 0 of one call. Features serve less the larger steps are."""
    steps = np.diff(table.log_snr)
    return float(np.median(steps)) if steps.size else 0.0


def _least_error(table: Table, drift: FeatureDrift, *, end: int, count: int) -> tuple[int, ...]:
    errors = _segment_errors(_weights(table), _drifts(table, drift))
    late = int((table.log_snr < _LITTLE_NOISE).sum())  # the first call with little noise
    if count > 1 and late < len(table.steps) - 1:
        errors[:late, late + 1 :] = np.inf
    least = errors[0]  # over the calls before each end, with one full step
    chosen: list[NDArray[np.intp]] = []  # by count and end, the last full step
    for _ in range(count - 1):
        sums = least[:-1, None] + errors
        chosen.append(sums.argmin(axis=0))
        least = sums.min(axis=0)
    return _traced_back(chosen, end)


def _traced_back(chosen: list[NDArray[np.intp]], end: int) -> tuple[int, ...]:
    found = list[int]()
    for last in reversed(chosen):
        end = int(last[end])
        found.append(end)
    return (0, *reversed(found))


def _segment_errors(weights: Vector, drifts: Vector) -> Vector:
    """The summed error [n, n + 1] of the calls from a full one up to an end; infinite where the end is not behind it.

    sum w^2 (d - d_full)^2, of which each power of d is a difference of running sums.
    """
    calls = len(weights)
    sums = [np.append(0, np.cumsum(weights**2 * drifts**power)) for power in range(3)]
    zeroth, first, second = (running - running[:-1, None] for running in sums)
    full = drifts[:, None]
    errors = second - 2 * full * first + full**2 * zeroth
    behind = np.arange(calls + 1) > np.arange(calls)[:, None]
    return np.where(behind, errors, np.inf)


def _weights(table: Table) -> Vector:
    """How far each call's output moves x, over all steps, relative to a latent of unit variance and its noise: [n]."""
    scales = np.array([step.scale for step in table.steps[1:]] + [1.0])
    moves = _moves(table) * scales[:, None]
    moves[-1] *= _LAST
    weights: Vector = np.linalg.norm(moves, axis=0)
    return weights


def _moves(table: Table) -> Vector:
    """How far the output of each call moves x in each step, by itself or from the memory: [step, call]."""
    matrices = np.array([step.matrix for step in table.steps])
    calls = len(matrices)
    moves = np.zeros((calls, calls))
    lanes = matrices[:, :, _MODEL]  # of each call's output, after its own step, and then after later ones
    for age in range(calls):
        if age:
            lanes = np.einsum("nlm,nm->nl", matrices[age:, :, _MEMORY], lanes[:-1, 1:-1])
        moves[np.arange(age, calls), np.arange(calls - age)] = lanes[:, _X]
    return moves


def _drifts(table: Table, drift: FeatureDrift) -> Vector:
    """The accumulated drift at each call's noise level: [n]. Beyond the measured levels it goes on as at their ends."""
    found = table.log_snr
    x, y = np.array(drift.log_snr), np.array(drift.total)
    slopes = np.diff(y) / np.diff(x)
    below, above = np.minimum(found - x[0], 0) * slopes[0], np.maximum(found - x[-1], 0) * slopes[-1]
    drifts: Vector = np.interp(found, x, y) + below + above
    return drifts
