"""Methods over x = x0 + sigma eps, whose noise knows no bound: Karras et al. (2022), and k-diffusion after them."""

from __future__ import annotations

import math
from itertools import chain

import numpy as np

from engines.schedulers.levels import (
    Single,
    Vector,
    between,
    check_falling,
    sigma_to_t,
    spaced,
    t_to_sigma,
    training_sigmas,
)
from engines.schedulers.steps import M1, M2, M3, MODEL, NOISE, Setting, Step, Table, X, make_steps


def euler(setting: Setting) -> Table:
    """Euler's method on the probability flow, Karras et al. (2022), algorithm 2 without churn."""
    t, sigmas = _levels(setting, ends_at_zero=setting.ends_at_zero)
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    x0, d = _derivative(setting, sigma)
    steps = _steps(t, sigma, X + (sigma_next - sigma) * d, denoised=x0)
    return _table(setting, sigmas, steps[setting.skip :])


def euler_ancestral(setting: Setting) -> Table:
    """Euler down past the next noise level, then fresh noise up to it: Song et al. (2020), eq. 16 with eta = 1."""
    t, sigmas = _levels(setting)
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    sigma_down, sigma_up = _ancestral(sigma, sigma_next)
    x0, d = _derivative(setting, sigma)
    x = X + (sigma_down - sigma) * d + sigma_up * NOISE
    return _table(setting, sigmas, _steps(t, sigma, x, denoised=x0, draws=True)[setting.skip :])


def heun(setting: Setting) -> Table:
    """Heun's method on the probability flow, Karras et al. (2022), algorithm 1: two calls a step, the last step one."""
    t, sigmas = _levels(setting)
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    x0, d = _derivative(setting, sigma)
    first = _steps(t, sigma, X + (sigma_next - sigma) * d, d, X, denoised=x0)
    x0, d = _derivative(setting, sigma_next[:-1])
    second = _steps(t[1:], sigma_next[:-1], M2 + (sigma_next - sigma)[:-1] * (M1 + d) / 2, denoised=x0)
    return _table(setting, sigmas, _in_turn(first, second)[2 * setting.skip :])


def kdpm2(setting: Setting, *, ancestral: bool = False) -> Table:
    """DPM-Solver-2, Lu et al. (2022), as k-diffusion has it: the slope halfway down in log sigma is that of the step.

    Two calls a step, the last step one. Fresh noise comes with the second. A picture is noised for the second call as
    for the next step, not as for halfway.
    """
    t, sigmas = _levels(setting, whole=setting.scheduler.sigmas == "karras")
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    sigma_down, sigma_up = _ancestral(sigma, sigma_next) if ancestral else (sigma_next, 0 * sigma)
    halfway = np.sqrt(sigma * sigma_down)  # of the last step, the end
    x0, d = _derivative(setting, sigma)
    first = _steps(t, sigma, X + (halfway - sigma) * d, X, denoised=x0)
    x0, d = _derivative(setting, halfway[:-1])
    x = M1 + (sigma_down - sigma)[:-1] * d + sigma_up[:-1] * NOISE
    t = sigma_to_t(halfway[:-1], _training(setting))
    second = _steps(t, halfway[:-1], x, denoised=x0, noise=sigma_next[:-1], draws=ancestral)
    return _table(setting, sigmas, _in_turn(first, second)[2 * setting.skip :])


def lms(setting: Setting) -> Table:
    """Linear multistep of order 4 in sigma, as k-diffusion has it: Adams-Bashforth over uneven steps.

    With `skip` the weights are those of the whole history, though it begins there: what is missing counts as 0, as in
    diffusers.
    """
    t, sigmas = _levels(setting)
    check_falling(sigmas[:-1, 0], setting.scheduler.name)
    x0, d = _derivative(setting, sigmas[:-1])
    known = np.arange(setting.num_steps)[:, None] - setting.skip
    slopes = (d, *(np.where(known > k, m, 0) for k, m in enumerate((M1, M2, M3))))
    x = X + sum(weight * slope for weight, slope in zip(_adams_bashforth(sigmas), slopes, strict=True))
    return _table(setting, sigmas, _steps(t, sigmas[:-1], x, *slopes[:3], denoised=x0)[setting.skip :])


def _adams_bashforth(sigmas: Vector) -> list[Vector]:
    """The weights of each step's slope and of the three before it: [n, 1] each.

    They are the integrals over the step of Lagrange's polynomials, of degree 3, for which Gauss's two points do. What
    would be before the first level is so far away that it has no say.
    """
    far = np.array([[3e30], [2e30], [1e30]])
    knots = [np.concatenate([far, sigmas])[3 - k : -1 - k] for k in range(4)]
    middle, half = (sigmas[1:] + sigmas[:-1]) / 2, (sigmas[1:] - sigmas[:-1]) / 2
    points = middle - half / math.sqrt(3), middle + half / math.sqrt(3)

    def lagrange(j: int, tau: Vector) -> Vector:
        product = np.ones_like(tau)
        for knot in knots[:j] + knots[j + 1 :]:
            product *= (tau - knot) / (knots[j] - knot)
        return product

    return [half * (lagrange(j, points[0]) + lagrange(j, points[1])) for j in range(4)]


def _levels(setting: Setting, *, ends_at_zero: bool = True, whole: bool = False) -> tuple[Vector, Vector]:
    """Timesteps [n, 1], fractional unless `whole`, and the sigmas of each and of the end: [n + 1, 1]."""
    train = _training(setting)
    timesteps = spaced(setting.num_steps, setting.spacing("linspace"), setting.schedule)
    timesteps = timesteps.astype(np.float32).astype(np.float64)  # the float32 values that diffusers passes to the UNet
    sigmas = t_to_sigma(timesteps, train)
    if setting.scheduler.sigmas != "default":
        sigmas = between(float(sigmas[0]), float(sigmas[-1]), setting.num_steps, sigmas=setting.scheduler.sigmas)
        timesteps = sigma_to_t(sigmas, train)
    end = 0.0 if ends_at_zero else float(train[0])
    return (timesteps.round() if whole else timesteps)[:, None], np.append(sigmas, end)[:, None]


def _training(setting: Setting) -> Single:
    return training_sigmas(setting.schedule, zero_snr=setting.zero_snr)


def _derivative(setting: Setting, sigma: Vector) -> tuple[Vector, Vector]:
    """x0, and the slope of x in sigma, Karras et al. (2022), eq. 3."""
    alpha = 1 / np.hypot(sigma, 1)
    x0, _ = setting.predict(alpha * X, MODEL, alpha, sigma * alpha)
    return x0, (X - x0) / sigma


def _ancestral(sigma: Vector, sigma_next: Vector) -> tuple[Vector, Vector]:
    """How far down to step, and how much noise brings x up again to `sigma_next`."""
    ratio = sigma_next / sigma
    return sigma_next * ratio, sigma_next * np.sqrt(1 - ratio**2)


def _steps(
    t: Vector,
    sigma: Vector,
    x: Vector,
    *memory: Vector,
    denoised: Vector,
    noise: Vector | None = None,
    draws: bool = False,
) -> tuple[Step, ...]:
    level = 1.0, sigma if noise is None else noise
    return make_steps(t, x, *memory, denoised=denoised, level=level, scale=1 / np.hypot(sigma, 1), draws=draws)


def _in_turn(first: tuple[Step, ...], second: tuple[Step, ...]) -> tuple[Step, ...]:
    """The two calls of each step, the last of which has one."""
    return (*chain.from_iterable(zip(first, second, strict=False)), first[-1])


def _table(setting: Setting, sigmas: Vector, steps: tuple[Step, ...]) -> Table:
    sigma_max = float(sigmas[0, 0])
    leading = setting.spacing("linspace") == "leading"
    return Table(math.hypot(sigma_max, 1) if leading else sigma_max, steps)
