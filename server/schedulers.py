"""Schedulers as tables: every step of every method is linear in x, the model's output, fresh noise and the memory.

A method writes its formulas over the basis vectors X, MODEL, NOISE, M1, M2, M3, so they read as in its paper, and what
they compute is a row of the step's matrix, float64, on the host. Multiplying by the tensors is the device's work.

The reference is diffusers' class of the same method, configured by `from_config(the checkpoint's scheduler config)`:
the same calls, the same timesteps, and x in the same space, so that one row of a table stands for one `step()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engines.base import LANES, TERMS
from engines.manifest import NoiseSchedule

Vector = NDArray[np.float64]

X, MODEL, NOISE, M1, M2, M3 = np.eye(TERMS)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One UNet call and what it makes of the lanes.

    `matrix` is [LANES, TERMS] float64, read-only: rows x', m1', m2', m3', denoised over columns x, model,
    noise, m1, m2, m3. `denoised` is the method's estimate of x0, for previews; no later step reads it.
    No step reads a memory lane that none before it has written, so lanes may start as anything finite.
    """

    timestep: float  # what the UNet is told
    scale: float  # c_in: the UNet sees scale * x
    matrix: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Table:
    """A method worked out for one step count and noise schedule. x starts as `init_scale` times standard noise."""

    init_scale: float  # init_noise_sigma
    stochastic: bool  # draws fresh noise once per step, the last one included, after the noise x starts from
    steps: tuple[Step, ...]  # one per UNet call


_LCM_TRAINED = 50  # timesteps that latent consistency models are distilled on

Method = Callable[[int, NoiseSchedule], Table]
Spacing = Literal["leading", "linspace", "trailing"]


def ddim(num_steps: int, schedule: NoiseSchedule) -> Table:
    """DDIM, Song et al. (2020), eq. 12 with sigma = 0."""
    alpha_bar = _alpha_bar(schedule)
    final = alpha_bar[0] if schedule.set_alpha_to_one is False else 1.0
    dt = schedule.num_train_timesteps // num_steps
    steps = []
    for t in _indices(num_steps, schedule):
        alpha, sigma = _alpha_sigma(alpha_bar[t])
        alpha_next, sigma_next = _alpha_sigma(alpha_bar[t - dt] if t >= dt else final)
        x0, eps = _predict(schedule, X, MODEL, alpha=alpha, sigma=sigma)
        steps.append(_step(t, alpha_next * x0 + sigma_next * eps, denoised=x0))
    return Table(init_scale=1.0, stochastic=False, steps=tuple(steps))


def pndm(num_steps: int, schedule: NoiseSchedule) -> Table:
    """PLMS of PNDM, Liu et al. (2022), eqs. 9 and 12; the second timestep comes twice, so n > 1 steps are n + 1 calls.

    `skip_prk_steps` is taken as true, which SD checkpoints say: the third Runge-Kutta round would have to remember its
    starting point and three outputs, and there are three lanes.
    """
    _refuse_sample_prediction("pndm", schedule)
    alpha_bar = _alpha_bar(schedule)
    final = 1.0 if schedule.set_alpha_to_one else alpha_bar[0]
    dt = schedule.num_train_timesteps // num_steps
    timesteps = _indices(num_steps, schedule)
    steps = []
    for i, t in enumerate(timesteps[:2] + timesteps[1:]):
        x, t_from, t_next = X, t, t - dt
        memory: tuple[Vector, ...]
        match i:
            case 0:
                model, memory = MODEL, (MODEL, X)
            case 1:  # step 0 again from its starting point, with the mean of the outputs at its two ends
                x, t_from, t_next = M2, t + dt, t
                model, memory = (MODEL + M1) / 2, (M1,)
            case 2:
                model, memory = (3 * MODEL - M1) / 2, (MODEL, M1)
            case 3:
                model, memory = (23 * MODEL - 16 * M1 + 5 * M2) / 12, (MODEL, M1, M2)
            case _:
                model, memory = (55 * MODEL - 59 * M1 + 37 * M2 - 9 * M3) / 24, (MODEL, M1, M2)
        alpha, sigma = _alpha_sigma(alpha_bar[t_from])
        alpha_next, sigma_next = _alpha_sigma(alpha_bar[t_next] if t_next >= 0 else final)
        x0, eps = _predict(schedule, x, model, alpha=alpha, sigma=sigma)
        alpha, sigma = _alpha_sigma(alpha_bar[t])
        denoised, _ = _predict(schedule, X, MODEL, alpha=alpha, sigma=sigma)
        steps.append(_step(t, alpha_next * x0 + sigma_next * eps, memory, denoised=denoised))
    return Table(init_scale=1.0, stochastic=False, steps=tuple(steps))


def dpmpp_2m(num_steps: int, schedule: NoiseSchedule, *, karras: bool = False) -> Table:
    """DPM-Solver++(2M), Lu et al. (2022), algorithm 2, with m1 the x0 before; diffusers' karras timesteps are whole."""
    train = _sigmas(schedule)
    if karras:
        levels = _karras(num_steps, sigma_min=train[0], sigma_max=train[-1])
        timesteps = _sigma_to_t(levels, train)
        timesteps = timesteps if schedule.beta_schedule == "squaredcos_cap_v2" else timesteps.round()
    else:
        spacing = schedule.timestep_spacing or "linspace"
        count = num_steps if spacing == "trailing" else num_steps + 1  # the others keep a place for the end
        timesteps = _timesteps(count, spacing, schedule)[:num_steps].round()
        levels = _t_to_sigma(timesteps, train)
    if (np.diff(levels) >= 0).any():
        raise ValueError(f"{num_steps} steps of dpmpp_2m do not fit between the training timesteps: ask for fewer.")
    sigmas = [*levels.tolist(), _final_sigma(schedule, train)]
    first_order = {0}  # and the last one, where h is infinite or the steps are few
    if num_steps < 15 or sigmas[-1] == 0:
        first_order.add(num_steps - 1)
    steps = []
    for i, (t, (sigma, sigma_next)) in enumerate(zip(timesteps.astype(int), pairwise(sigmas), strict=True)):
        alpha, alpha_next = 1 / math.hypot(sigma, 1), 1 / math.hypot(sigma_next, 1)
        x0, _ = _predict(schedule, X, MODEL, alpha=alpha, sigma=sigma * alpha)
        d = x0
        if i not in first_order:
            h, h_last = math.log(sigma / sigma_next), math.log(sigmas[i - 1] / sigma)
            d = x0 + h / (2 * h_last) * (x0 - M1)
        ratio = sigma_next / sigma  # exp(-h)
        x = ratio * alpha_next / alpha * X + alpha_next * (1 - ratio) * d
        steps.append(_step(t, x, (x0,), denoised=x0))
    return Table(init_scale=1.0, stochastic=False, steps=tuple(steps))


def euler(num_steps: int, schedule: NoiseSchedule, *, karras: bool = False) -> Table:
    """Euler's method on the probability flow, Karras et al. (2022), algorithm 2 without churn."""
    train = _sigmas(schedule)
    timesteps, levels = _euler_levels(num_steps, schedule, train)
    if karras:
        levels = _karras(num_steps, sigma_min=levels[-1], sigma_max=levels[0])
        timesteps = _sigma_to_t(levels, train)
    sigmas = [*levels.tolist(), _final_sigma(schedule, train)]
    steps = []
    for t, (sigma, sigma_next) in zip(timesteps, pairwise(sigmas), strict=True):
        alpha = 1 / math.hypot(sigma, 1)
        x0, _ = _predict(schedule, alpha * X, MODEL, alpha=alpha, sigma=sigma * alpha)
        d = (X - x0) / sigma
        steps.append(_step(t, X + d * (sigma_next - sigma), denoised=x0, scale=alpha))
    return Table(init_scale=_euler_init(schedule, sigmas[0]), stochastic=False, steps=tuple(steps))


def euler_ancestral(num_steps: int, schedule: NoiseSchedule) -> Table:
    """Euler down past the next noise level, then fresh noise up to it: Song et al. (2020), eq. 16 with eta = 1."""
    _refuse_sample_prediction("euler_ancestral", schedule)
    timesteps, levels = _euler_levels(num_steps, schedule, _sigmas(schedule))
    sigmas = [*levels.tolist(), 0.0]
    steps = []
    for t, (sigma, sigma_next) in zip(timesteps, pairwise(sigmas), strict=True):
        sigma_up = sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        sigma_down = sigma_next**2 / sigma
        alpha = 1 / math.hypot(sigma, 1)
        x0, _ = _predict(schedule, alpha * X, MODEL, alpha=alpha, sigma=sigma * alpha)
        d = (X - x0) / sigma
        x = X + d * (sigma_down - sigma) + sigma_up * NOISE
        steps.append(_step(t, x, denoised=x0, scale=alpha))
    return Table(init_scale=_euler_init(schedule, sigmas[0]), stochastic=True, steps=tuple(steps))


def lcm(num_steps: int, schedule: NoiseSchedule) -> Table:
    """Multistep latent consistency sampling, Luo et al. (2023), algorithm 3: leap to x0, and noise it again."""
    if num_steps > _LCM_TRAINED:
        raise ValueError(f"{num_steps} steps: lcm takes 1 to {_LCM_TRAINED}, and needs 2 to 8.")
    alpha_bar = _alpha_bar(schedule)
    trained = np.arange(1, _LCM_TRAINED + 1)[::-1] * (schedule.num_train_timesteps // _LCM_TRAINED) - 1
    timesteps = trained[np.linspace(0, _LCM_TRAINED, num_steps, endpoint=False).astype(int)].tolist()
    steps = []
    for t, t_next in zip(timesteps, [*timesteps[1:], None], strict=True):
        alpha, sigma = _alpha_sigma(alpha_bar[t])
        x0, _ = _predict(schedule, X, MODEL, alpha=alpha, sigma=sigma)
        # The boundary condition, eq. 3 there, with sigma_data = 0.5 and t scaled by 10: x itself at t = 0.
        c_skip, c_out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / math.hypot(10 * t, 0.5)
        denoised = c_out * x0 + c_skip * X
        alpha_next, sigma_next = (1.0, 0.0) if t_next is None else _alpha_sigma(alpha_bar[t_next])
        steps.append(_step(t, alpha_next * denoised + sigma_next * NOISE, denoised=denoised))
    return Table(init_scale=1.0, stochastic=True, steps=tuple(steps))


_METHODS: dict[str, Method] = {
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_karras": partial(dpmpp_2m, karras=True),
    "euler": euler,
    "euler_karras": partial(euler, karras=True),
    "euler_ancestral": euler_ancestral,
    "lcm": lcm,
    "pndm": pndm,
}
NAMES = tuple(_METHODS)


@lru_cache
def table(name: str, num_steps: int, schedule: NoiseSchedule) -> Table:
    """Work out the table of scheduler `name` for `num_steps` steps.

    Raises ValueError for a name not in NAMES, a step count outside 1..num_train_timesteps, and for what the method
    cannot do: sample prediction with pndm and euler_ancestral, more steps than a method's timesteps have room for.
    """
    if name not in _METHODS:
        raise ValueError(f"unknown scheduler {name!r}: choose one of {', '.join(NAMES)}.")
    if not 1 <= num_steps <= schedule.num_train_timesteps:
        raise ValueError(f"{num_steps} steps: ask for 1 to {schedule.num_train_timesteps}.")
    return _METHODS[name](num_steps, schedule)


def _step(timestep: float, x: Vector, memory: tuple[Vector, ...] = (), *, denoised: Vector, scale: float = 1.0) -> Step:
    matrix = np.zeros((LANES, TERMS))
    matrix[0] = x
    for lane, m in enumerate(memory, start=1):
        matrix[lane] = m
    matrix[-1] = denoised
    matrix.setflags(write=False)
    return Step(float(timestep), scale, matrix)


def _predict(schedule: NoiseSchedule, x: Vector, model: Vector, *, alpha: float, sigma: float) -> tuple[Vector, Vector]:
    """x0 and eps of x = alpha x0 + sigma eps, alpha^2 + sigma^2 = 1; v = alpha eps - sigma x0, Salimans & Ho (2022)."""
    match schedule.prediction_type:
        case "epsilon":
            return (x - sigma * model) / alpha, model
        case "v_prediction":
            return alpha * x - sigma * model, alpha * model + sigma * x
        case "sample":
            return model, (x - alpha * model) / sigma


def _refuse_sample_prediction(name: str, schedule: NoiseSchedule) -> None:
    if schedule.prediction_type == "sample":
        raise ValueError(
            f"{name} is not defined for models that predict the sample: choose another scheduler, as ddim."
        )


def _alpha_bar(schedule: NoiseSchedule) -> Vector:
    """The product of 1 - beta up to each training timestep, Ho et al. (2020), eq. 4: [num_train_timesteps]."""
    total = schedule.num_train_timesteps
    if schedule.trained_betas is not None:
        betas = np.array(schedule.trained_betas)
    elif schedule.beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal (2021), eq. 17
        f = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    elif schedule.beta_schedule == "scaled_linear":
        betas = np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, total) ** 2
    else:
        betas = np.linspace(schedule.beta_start, schedule.beta_end, total)
    # 1 - beta in float32, as torch has it: at beta = 8e-4 its rounding moves the smallest sigma by 1e-5.
    return np.cumprod(1 - betas.astype(np.float32), dtype=np.float64)


def _alpha_sigma(alpha_bar: float) -> tuple[float, float]:
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def _sigmas(schedule: NoiseSchedule) -> Vector:
    """Noise per unit of signal at each training timestep, the sigma of Karras et al. (2022), rising."""
    alpha_bar = _alpha_bar(schedule)
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def _t_to_sigma(t: Vector, train: Vector) -> Vector:
    return np.interp(t, np.arange(len(train)), train)


def _sigma_to_t(sigmas: Vector, train: Vector) -> Vector:
    return np.interp(np.log(sigmas), np.log(train), np.arange(len(train)))


def _karras(n: int, *, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Vector:
    """Karras et al. (2022), eq. 5: [n], falling from sigma_max to sigma_min."""
    ramp = np.linspace(0, 1, n)
    max_inv_rho, min_inv_rho = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels: Vector = (max_inv_rho + ramp * (min_inv_rho - max_inv_rho)) ** rho
    return levels


def _final_sigma(schedule: NoiseSchedule, train: Vector) -> float:
    return float(train[0]) if schedule.final_sigmas_type == "sigma_min" else 0.0


def _timesteps(count: int, spacing: Spacing, schedule: NoiseSchedule) -> Vector:
    """Lin et al. (2023), table 2: [count], noisiest first; linspace is fractional."""
    total = schedule.num_train_timesteps
    match spacing:
        case "linspace":
            return np.linspace(0, total - 1, count)[::-1]
        case "leading":
            return np.arange(count, dtype=np.float64)[::-1] * (total // count) + schedule.steps_offset
        case "trailing":
            # [:count] as arange rounds: for some counts (61 of 1000) it adds timestep -1, which diffusers then runs.
            return np.arange(total, 0, -total / count)[:count].round() - 1


def _indices(num_steps: int, schedule: NoiseSchedule) -> list[int]:
    """Timesteps of the methods that look alpha_bar up where the others interpolate."""
    timesteps: list[int] = (
        _timesteps(num_steps, schedule.timestep_spacing or "leading", schedule).round().astype(int).tolist()
    )
    if timesteps[0] >= schedule.num_train_timesteps:
        raise ValueError(
            f"{num_steps} steps and steps_offset {schedule.steps_offset} overrun the training timesteps: ask for fewer."
        )
    return timesteps


def _euler_levels(num_steps: int, schedule: NoiseSchedule, train: Vector) -> tuple[Vector, Vector]:
    timesteps = _timesteps(num_steps, schedule.timestep_spacing or "linspace", schedule)
    timesteps = timesteps.astype(np.float32).astype(np.float64)  # the float32 values that diffusers passes to the UNet
    return timesteps, _t_to_sigma(timesteps, train)


def _euler_init(schedule: NoiseSchedule, sigma_max: float) -> float:
    return math.hypot(sigma_max, 1) if schedule.timestep_spacing == "leading" else sigma_max
