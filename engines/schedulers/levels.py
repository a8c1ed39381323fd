"""Noise levels: those a checkpoint was trained with, and those that a run of few steps passes through.

`alpha_bar` is the signal's share of the variance, Ho et al. (2020), eq. 4; sigma is noise per unit of signal, Karras et
al. (2022), so that sigma^2 = (1 - alpha_bar) / alpha_bar.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engines.manifest import NoiseSchedule

Vector = NDArray[np.float64]
Single = NDArray[np.float32]
Whole = NDArray[np.int64]
Sigmas = Literal["default", "karras", "exponential", "beta"]
Spacing = Literal["leading", "linspace", "trailing"]

_DARKEST = 2.0**-24  # alpha_bar in place of 0, where sigma would be infinite; diffusers' number
_BETA_TERMS = 50  # of a series in x <= 1/2: the rest is below 1e-16


def alpha_bar(schedule: NoiseSchedule, *, zero_snr: bool) -> Vector:
    """The share of signal at each training timestep [num_train_timesteps]: falling, to 0 if `zero_snr`."""
    return _alpha_bar(schedule, zero_snr=zero_snr).astype(np.float64)


def training_sigmas(schedule: NoiseSchedule, *, zero_snr: bool) -> Single:
    """The sigma of each training timestep: [num_train_timesteps], rising, all of them finite."""
    left = _alpha_bar(schedule, zero_snr=zero_snr)
    if zero_snr:
        left = np.append(left[:-1], np.float32(_DARKEST))
    sigmas: Single = np.sqrt((1 - left) / left)
    return sigmas


@lru_cache(maxsize=16)
def _alpha_bar(schedule: NoiseSchedule, *, zero_snr: bool) -> Single:
    """In float32, as torch has it.

    At beta = 8e-4 the rounding of 1 - beta moves the smallest sigma by 1e-5, and whether diffusers gives the UNet 999
    or 998 can depend on the last digit.
    """
    levels: Vector = np.cumprod(1 - _betas(schedule), dtype=np.float64)
    falls = bool((np.diff(levels.astype(np.float32), prepend=np.float32(1)) < 0).all())
    if len(levels) < 2 or not falls or levels[-1] <= 0:
        raise ValueError("The checkpoint's noise schedule does not add noise at every timestep: mend its betas.")
    if zero_snr:  # Lin et al. (2023), algorithm 1
        root = np.sqrt(levels)
        levels = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return levels.astype(np.float32)


def _betas(schedule: NoiseSchedule) -> Single:
    total = schedule.num_train_timesteps
    if schedule.trained_betas is not None:
        return np.array(schedule.trained_betas, np.float32)
    if schedule.beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal (2021), eq. 17
        f = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.asarray(np.minimum(1 - f[1:] / f[:-1], 0.999), np.float32)
    if schedule.beta_schedule == "linear":
        return _linspace(schedule.beta_start, schedule.beta_end, total)
    betas: Single = _linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, total) ** 2
    return betas


def _linspace(start: float, stop: float, n: int) -> Single:
    """torch.linspace in float32: it walks from both ends to the middle, and rounds once."""
    first, last = np.float32(start), np.float32(stop)
    step = float((last - first) / np.float32(max(n - 1, 1)))
    i = np.arange(n)
    return np.where(i < n // 2, float(first) + step * i, float(last) - step * (n - 1 - i)).astype(np.float32)


def spaced(count: int, spacing: Spacing, schedule: NoiseSchedule) -> Vector:
    """Timesteps, Lin et al. (2023), table 2: [count], noisiest first; linspace is fractional."""
    total = schedule.num_train_timesteps
    match spacing:
        case "linspace":
            return np.linspace(0, total - 1, count)[::-1]
        case "leading":
            return np.arange(count, dtype=np.float64)[::-1] * (total // count) + schedule.steps_offset
        case "trailing":
            # [:count] as arange rounds: for some counts (61 of 1000) it adds timestep -1, which diffusers then runs.
            return np.arange(total, 0, -total / count)[:count].round() - 1


def t_to_sigma(t: Vector, train: Single) -> Vector:
    return np.interp(t, np.arange(len(train)), train)


def sigma_to_t(sigmas: Vector, train: Single) -> Vector:
    """The fractional timesteps of `sigmas`, interpolated in the logarithm, with diffusers' roundings."""
    knots, log = np.log(train), np.log(sigmas)
    low = (np.searchsorted(knots, log, side="right") - 1).clip(0, len(train) - 2)
    w = ((knots[low] - log) / (knots[low] - knots[low + 1])).clip(0, 1)
    t: Vector = (1 - w) * low + w * (low + 1)
    return t


def between(sigma_max: float, sigma_min: float, n: int, *, sigmas: Sigmas) -> Vector:
    """Levels that do not come from timesteps: [n], falling from one end to the other."""
    match sigmas:
        case "karras":  # Karras et al. (2022), eq. 5 with rho = 7
            ramp, rho = np.linspace(0, 1, n), 7
            top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
            levels: Vector = (top + ramp * (bottom - top)) ** rho
            return levels
        case "exponential":  # even in the logarithm
            return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), n))
        case "beta":  # Lee et al. (2024), dense at both ends
            return sigma_min + beta_quantile(1 - np.linspace(0, 1, n)) * (sigma_max - sigma_min)
        case "default":
            raise ValueError("the default levels are those of timesteps")


def check_falling(levels: Vector, name: str) -> None:
    """Raise ValueError where two steps share a level, between which a history has no slope."""
    if (np.diff(levels) >= 0).any():
        raise ValueError(f"{len(levels)} steps of {name} do not fit between the training timesteps: ask for fewer.")


def beta_quantile(p: Vector, *, a: float = 0.6) -> Vector:
    """The quantile function of the distribution Beta(a, a): what of it lies below the result has probability p.

    The density is symmetric, so only x <= 1/2 is worked out: there, with u = x^a, the incomplete beta function is u
    times a power series in x (DLMF 8.17.7), convex in u with slope (1 - x)^(a - 1) / a. Newton comes down to the root.
    """
    k = np.arange(_BETA_TERMS)
    series = np.cumprod(np.append(1.0, (k[1:] - a) / k[1:])) / (a + k)
    lower = np.minimum(p, 1 - p) * math.gamma(a) ** 2 / math.gamma(2 * a)
    u = a * lower
    x = u ** (1 / a)
    for _ in range(5):  # the digits that are right double each time
        u = u - (u * (np.vander(x, _BETA_TERMS, increasing=True) @ series) - lower) * a * (1 - x) ** (1 - a)
        x = u ** (1 / a)
    return np.where(p <= 0.5, x, 1 - x)
