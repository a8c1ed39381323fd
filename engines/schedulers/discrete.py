"""Methods that step from one training timestep to another: DDIM, DDPM, PLMS, and those of distilled models."""

from __future__ import annotations

import numpy as np

from engines.schedulers.levels import Vector, Whole, alpha_bar, spaced
from engines.schedulers.steps import M1, M2, M3, MODEL, NOISE, Setting, Table, X, make_steps

_DISTILLED = 50  # timesteps that consistency models are distilled on

# The output that PLMS steps with, by the number of calls before: Adams and Bashforth's, from the third call on.
_PLMS = np.stack(
    [
        MODEL,
        (MODEL + M1) / 2,
        (3 * MODEL - M1) / 2,
        (23 * MODEL - 16 * M1 + 5 * M2) / 12,
        (55 * MODEL - 59 * M1 + 37 * M2 - 9 * M3) / 24,
    ]
)


def ddim(setting: Setting) -> Table:
    """DDIM, Song et al. (2020), eqs. 12 and 16: eta 0 takes no fresh noise, eta 1 as much as DDPM."""
    left = alpha_bar(setting.schedule, zero_snr=setting.zero_snr)
    eta = setting.scheduler.eta or 0.0
    t = _timesteps(setting)[setting.skip :]
    dt = setting.schedule.num_train_timesteps // setting.num_steps
    a = left[t]
    a_next = np.where(t >= dt, left[t - dt], left[0] if setting.schedule.set_alpha_to_one is False else 1.0)
    x0, eps = setting.predict(X, MODEL, *_split(a))
    fresh = eta * np.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
    x = np.sqrt(a_next) * x0 + np.sqrt(np.maximum(1 - a_next - fresh**2, 0)) * eps + fresh * NOISE
    return Table(1.0, make_steps(t, x, denoised=x0, level=_split(a), draws=eta > 0))


def ddpm(setting: Setting) -> Table:
    """DDPM, Ho et al. (2020), eq. 7, over the timesteps that are visited, with the smaller of its two variances."""
    left = alpha_bar(setting.schedule, zero_snr=setting.zero_snr)
    t = _timesteps(setting)[setting.skip :]
    a = left[t]
    a_next = np.append(a[1:], [[1.0]], axis=0)
    x0, _ = setting.predict(X, MODEL, *_split(a))
    beta = 1 - a / a_next
    mean = (np.sqrt(a_next) * beta * x0 + np.sqrt(1 - beta) * (1 - a_next) * X) / (1 - a)
    variance = np.maximum((1 - a_next) / (1 - a) * beta, 1e-20)
    x = mean + np.where(t > 0, np.sqrt(variance), 0) * NOISE
    return Table(1.0, make_steps(t, x, denoised=x0, level=_split(a), draws=t > 0))


def pndm(setting: Setting) -> Table:
    """PLMS of PNDM, Liu et al. (2022), eqs. 9 and 12; the second timestep comes twice, so n > 1 steps are n + 1 calls.

    The second call makes the first step again: from where it began, m2, by the mean of the outputs at its two ends.
    `skip_prk_steps` is taken as true, which SD checkpoints say: the third Runge-Kutta round would have to remember its
    starting point and three outputs, and there are three lanes. With `skip` calls are counted from the first one made,
    as in diffusers, though no timestep may come twice there.
    """
    left = alpha_bar(setting.schedule, zero_snr=setting.zero_snr)
    dt = setting.schedule.num_train_timesteps // setting.num_steps
    t = _timesteps(setting)
    t = np.concatenate([t[:2], t[1:]])[setting.skip :]
    call = np.arange(len(t))[:, None]
    t_from, t_next = np.where(call == 1, [t + dt, t], [t, t - dt])
    a_next = np.where(t_next >= 0, left[t_next], 1.0 if setting.schedule.set_alpha_to_one else left[0])
    x0, eps = setting.predict(np.where(call == 1, M2, X), _PLMS[np.minimum(call[:, 0], 4)], *_split(left[t_from]))
    alpha_next, sigma_next = _split(a_next)
    memory = (
        np.where(call == 1, M1, MODEL),
        np.where(call == 0, X, np.where(call == 1, 0, M1)),
        np.where(call < 3, 0, M2),
    )
    denoised, _ = setting.predict(X, MODEL, *_split(left[t]))
    x = alpha_next * x0 + sigma_next * eps
    return Table(1.0, make_steps(t, x, *memory, denoised=denoised, level=_split(left[t])))


def lcm(setting: Setting) -> Table:
    """Multistep latent consistency sampling, Luo et al. (2023), algorithm 3: leap to x0, and noise it again."""
    left = alpha_bar(setting.schedule, zero_snr=setting.zero_snr)
    t = _distilled(setting)
    a = left[t]
    x0, _ = setting.predict(X, MODEL, *_split(a))
    # The boundary condition, eq. 3 there, with sigma_data = 0.5 and t scaled by 10: x itself at t = 0.
    c_skip, c_out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / np.hypot(10 * t, 0.5)
    denoised = c_out * x0 + c_skip * X
    alpha_next, sigma_next = _split(np.append(a[1:], [[1.0]], axis=0))
    x = alpha_next * denoised + sigma_next * NOISE
    return Table(1.0, make_steps(t, x, denoised=denoised, level=_split(a), draws=sigma_next > 0))


def tcd(setting: Setting) -> Table:
    """Strategic stochastic sampling, Zheng et al. (2024): leap to s, beyond the next t, and noise it up to there.

    eta is their gamma, 0.3 by default. The last leap is to timestep 0, and takes no noise.
    """
    left = alpha_bar(setting.schedule, zero_snr=setting.zero_snr)
    gamma = 0.3 if setting.scheduler.eta is None else setting.scheduler.eta
    t = _distilled(setting)
    t_next = np.append(t[1:], [[0]], axis=0)
    # torch multiplies in float32, and the floor may hang on the last digit.
    s = (np.float32(1 - gamma) * t_next.astype(np.float32)).astype(np.int64)
    x0, eps = setting.predict(X, MODEL, *_split(left[t]))
    alpha_s, sigma_s = _split(left[s])
    alpha_up, sigma_up = _split(left[t_next] / left[s])
    x = alpha_up * (alpha_s * x0 + sigma_s * eps) + sigma_up * NOISE
    draws = (np.arange(len(t), 0, -1)[:, None] > 1) & (gamma > 0)
    return Table(1.0, make_steps(t, x, denoised=x0, level=_split(left[t]), draws=draws))


def _split(alpha_bar: Vector) -> tuple[Vector, Vector]:
    """Signal and noise of x."""
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def _timesteps(setting: Setting) -> Whole:
    """[num_steps, 1]."""
    timesteps = spaced(setting.num_steps, setting.spacing("leading"), setting.schedule).round().astype(np.int64)
    if timesteps[0] >= setting.schedule.num_train_timesteps:
        raise ValueError(
            f"{setting.num_steps} steps and steps_offset {setting.schedule.steps_offset} overrun the training "
            "timesteps: ask for fewer."
        )
    return timesteps[:, None]


def _distilled(setting: Setting) -> Whole:
    """Those given or, of the timesteps that the model was distilled on, every so many: [num_steps - skip, 1]."""
    total, name = setting.schedule.num_train_timesteps, setting.scheduler.method
    if setting.scheduler.timesteps is not None:
        return np.array(setting.scheduler.timesteps, np.int64)[setting.skip :, None]
    if setting.num_steps > _DISTILLED:
        raise ValueError(f"{setting.num_steps} steps: {name} takes 1 to {_DISTILLED}, and needs 2 to 8.")
    if total < _DISTILLED:
        raise ValueError(f"{name} needs {_DISTILLED} training timesteps, and this model has {total}: take ddim.")
    trained = np.arange(_DISTILLED, 0, -1) * (total // _DISTILLED) - 1
    chosen = np.linspace(0, _DISTILLED, setting.num_steps, endpoint=False).astype(np.int64)
    return trained[chosen[setting.skip :], None]
