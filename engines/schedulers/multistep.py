"""Solvers in log-SNR over x = alpha x0 + sigma eps: DPM-Solver++, DEIS, UniPC.

Levels are given as s = sigma / alpha, of which -log is the papers' lambda; h is what lambda gains in a step. The last
step may end at s = 0, where lambda is infinite, and every method here is of first order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engines.schedulers.levels import (
    Spacing,
    Vector,
    Whole,
    between,
    check_falling,
    sigma_to_t,
    spaced,
    t_to_sigma,
    training_sigmas,
)
from engines.schedulers.steps import M1, M2, M3, MODEL, NOISE, Setting, Table, X, make_steps

_FEW = 15  # steps below which methods of higher order end at a lower one


@dataclass(frozen=True, slots=True)
class _Columns:
    """The steps that are made, as columns [n, 1]."""

    t: Whole
    s: Vector
    s_next: Vector
    h: Vector  # 0 in place of infinity
    h1: Vector  # h of the step before, h2 of the one before that; where there is none, anything but 0
    h2: Vector
    known: Whole  # how many calls were made before
    left: Whole  # steps to go, this one included


def dpmpp_multistep(setting: Setting, *, order: int, sde: bool = False) -> Table:
    """DPM-Solver++(2M) and (3M) and the solvers of its SDE, Lu et al. (2022), algorithm 2; m1, m2 are the x0 before.

    The SDE decays by 2h where the ODE does by h. In its third-order term the sign of 1/2 is diffusers', with which the
    term does not vanish with h.
    """
    cosine = setting.schedule.beta_schedule == "squaredcos_cap_v2"
    at = _columns(setting, ends_at_zero=setting.ends_at_zero, whole=not cosine)
    p = _orders(setting, at, most=order, ends_at_zero=setting.ends_at_zero)
    (alpha, sigma), (alpha_next, sigma_next) = _split(at.s), _split(at.s_next)
    x0, _ = setting.predict(X, MODEL, alpha, sigma)
    ratio = at.s_next / at.s  # exp(-h)
    decay = ratio**2 if sde else ratio
    d1 = at.h / at.h1 * (x0 - M1)
    d = (1 - decay) * (x0 + np.where(p > 1, d1 / 2, 0))
    if order == 3:
        bend = (d1 - at.h / at.h2 * (M1 - M2)) / (at.h1 + at.h2)
        phi2, phi3 = _phi(at.h * (1 + sde))
        third = (1 - decay) * x0 + phi2 * (d1 + at.h1 * bend) - (phi3 + sde) * at.h * bend
        d = np.where(p == 3, third, d)
    x = ratio ** (1 + sde) * alpha_next / alpha * X + alpha_next * d
    if sde:
        x = x + sigma_next * np.sqrt(np.maximum(1 - decay, 0)) * NOISE
    memory = (x0, np.where(at.known > 0, M1, 0))[: order - 1]
    return Table(1.0, make_steps(at.t, x, *memory, denoised=x0, level=(alpha, sigma), draws=sde))


def dpmpp_singlestep(setting: Setting, *, order: int) -> Table:
    """DPM-Solver++(2S) and, by the midpoint at third order, (3S), Lu et al. (2022), algorithm 1.

    diffusers counts calls as steps: their orders go 1, 2 (, 3) and begin again, each from m2, where that of order 1
    began. m1 is the x0 of the call before, m3 of the one before that. Timesteps are spaced by linspace, always.
    """
    at = _columns(setting, spacing="linspace", ends_at_zero=setting.ends_at_zero)
    p = np.minimum((setting.num_steps - at.left) % order, at.known) + 1
    if setting.ends_at_zero:
        p[-1] = 1
    h1 = np.where(p == 1, 0, np.where(p == 2, at.h1, at.h1 + at.h2))  # what lambda gained since m2
    s_start, h = at.s * np.exp(h1), at.h + h1
    (alpha, sigma), (alpha_start, _), (alpha_next, _) = _split(at.s), _split(s_start), _split(at.s_next)
    x0, _ = setting.predict(X, MODEL, alpha, sigma)
    decay = at.s_next / s_start  # exp(-h)
    start, first = np.where(p == 1, X, M2), np.where(p == 1, x0, np.where(p == 2, M1, M3))
    slope = h / np.where(p == 1, 1, h1) * (x0 - first)
    d = (1 - decay) * first + np.where(p == 3, _phi(h)[0], (1 - decay) / 2) * slope
    x = decay * alpha_next / alpha_start * start + alpha_next * d
    memory = x0, start, np.where(p == 1, 0, M1)
    return Table(1.0, make_steps(at.t, x, *memory, denoised=x0, level=(alpha, sigma)))


def deis(setting: Setting) -> Table:
    """DEIS of order 2, Zhang & Chen (2023): eps is extrapolated in log s, m1 being the eps before.

    It does not end at zero, where log s has no end, but at the smallest training level.
    """
    at = _columns(setting, ends_at_zero=False)
    p = _orders(setting, at, most=2, ends_at_zero=False)
    (alpha, sigma), (alpha_next, _) = _split(at.s), _split(at.s_next)
    x0, eps = setting.predict(X, MODEL, alpha, sigma)
    # log(s / rho) / log(s_last / s), integrated over rho from s to s_next: how far eps is carried on.
    weight = (at.s_next * (1 + at.h) - at.s) / at.h1
    d = (at.s_next - at.s) * eps + np.where(p > 1, weight * (eps - M1), 0)
    x = alpha_next * (X / alpha + d)
    return Table(1.0, make_steps(at.t, x, eps, denoised=x0, level=(alpha, sigma)))


def unipc(setting: Setting) -> Table:
    """UniPC-2 with B(h) = e^h - 1, Zhao et al. (2023); m1 is the last x, corrected, m2 and m3 are the x0 before.

    A call first corrects the x that it was made for, then predicts the next one from there.
    """
    at = _columns(setting, ends_at_zero=setting.ends_at_zero)
    (alpha, sigma), (alpha_next, _) = _split(at.s), _split(at.s_next)
    x0, _ = setting.predict(X, MODEL, alpha, sigma)
    x = np.where(at.known > 0, _corrected(at, x0), X)
    ratio = at.s_next / at.s  # exp(-h)
    slope = np.where((at.known > 0) & (at.left > 1), at.h / at.h1 * (x0 - M2), 0)
    x_next = ratio * alpha_next / alpha * x + alpha_next * (1 - ratio) * (x0 + slope / 2)
    memory = x, x0, np.where(at.known > 0, M2, 0)
    return Table(1.0, make_steps(at.t, x_next, *memory, denoised=x0, level=(alpha, sigma)))


def _corrected(at: _Columns, x0: Vector) -> Vector:
    """UniC: the step to here made again from m1, now that x0 is known."""
    s_last, r = at.s * np.exp(at.h1), -at.h2 / at.h1
    (alpha_last, _), (alpha, _) = _split(s_last), _split(at.s)
    decay = at.s / s_last
    phi2, phi3 = _phi(at.h1)
    b1, b2 = phi2 / (1 - decay), -2 * phi3 / (1 - decay)
    rho1 = (b1 - b2) / (1 - r)  # solves rho1 + rho2 = b1, r rho1 + rho2 = b2
    d = np.where(at.known > 1, rho1 / r * (M3 - M2) + (b1 - rho1) * (x0 - M2), (x0 - M2) / 2)
    return decay * alpha / alpha_last * M1 + alpha * (1 - decay) * (M2 + d)


def _columns(setting: Setting, *, ends_at_zero: bool, spacing: Spacing | None = None, whole: bool = True) -> _Columns:
    """Where to step, with diffusers' timesteps: Karras' are rounded if `whole`, others lose their fractions.

    Of one step with levels of their own, UniPC and DEIS make none in diffusers; here it goes all the way.
    """
    n, train = setting.num_steps, training_sigmas(setting.schedule, zero_snr=setting.zero_snr)
    if setting.scheduler.sigmas == "default":
        spacing = spacing or setting.spacing("linspace")
        count = n if spacing == "trailing" else n + 1  # the end has its place among the others
        timesteps = spaced(count, spacing, setting.schedule)[:n].round()
        levels = t_to_sigma(timesteps, train)
    else:
        levels = between(float(train[-1]), float(train[0]), n, sigmas=setting.scheduler.sigmas)
        timesteps = sigma_to_t(levels, train)
        if whole and setting.scheduler.sigmas == "karras":
            timesteps = timesteps.round()
    check_falling(levels, setting.scheduler.name)
    levels = np.append(levels, 0.0 if ends_at_zero else float(train[0]))
    gains = np.log(levels[:-1] / np.where(levels[1:] > 0, levels[1:], levels[:-1]))
    gains = np.concatenate([[1.0, 1.0], gains])
    i = np.arange(setting.skip, n)[:, None]
    return _Columns(
        t=timesteps.astype(np.int64)[i],
        s=levels[i],
        s_next=levels[i + 1],
        h=gains[i + 2],
        h1=gains[i + 1],
        h2=gains[i],
        known=i - setting.skip,
        left=n - i,
    )


def _orders(setting: Setting, at: _Columns, *, most: int, ends_at_zero: bool) -> Whole:
    """What the history allows; less in the last of few steps, and one where lambda is infinite."""
    p = np.minimum(at.known + 1, most)
    if setting.num_steps < _FEW:
        p = np.minimum(p, at.left)
    return np.where((at.left == 1) & ends_at_zero, 1, p)


def _split(s: Vector) -> tuple[Vector, Vector]:
    """alpha and sigma, of which s is the ratio, with alpha^2 + sigma^2 = 1."""
    alpha = 1 / np.hypot(s, 1)
    return alpha, s * alpha


def _phi(h: Vector) -> tuple[Vector, Vector]:
    """phi2 = 1 - (1 - exp(-h)) / h and phi3 = phi2 / h - 1/2, and 0 for both at h = 0."""
    safe = np.where(h == 0, 1, h)
    phi2 = 1 + np.expm1(-h) / safe
    return np.where(h == 0, 0, phi2), np.where(h == 0, 0, phi2 / safe - 0.5)
