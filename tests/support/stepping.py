"""Schedulers at work, ours and diffusers', over the same model outputs and the same noise."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DEISMultistepScheduler, LMSDiscreteScheduler
from numpy.typing import NDArray

from engines.contract import MEMORY
from engines.manifest import NoiseSchedule
from engines.schedulers import Scheduler, table
from tests.support.references import CLASSES

Array = NDArray[np.float64]

SHAPE = (1, 2, 4, 4)


@dataclass
class Run:
    """What one loop over a scheduler's steps told the UNet, and what it made; lists are per call."""

    init_scale: float
    timesteps: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    levels: list[tuple[float, float]] = field(default_factory=list)
    draws: list[bool] = field(default_factory=list)
    xs: list[Array] = field(default_factory=list)
    denoised: list[Array] = field(default_factory=list)  # empty where the class keeps it to itself


@cache
def _made(scheduler: Scheduler, schedule: NoiseSchedule) -> Any:
    cls, settings = CLASSES[scheduler.name]
    options = {"timestep_spacing": scheduler.timestep_spacing, "final_sigmas_type": scheduler.final_sigmas_type}
    asked = {key: value for key, value in options.items() if value is not None}
    config = {**schedule.model_dump(exclude_none=True), **settings, **asked}
    with pytest.MonkeyPatch.context() as patch:
        # Some constructors set a thousand timesteps, which takes a second, and are told how many again below.
        patch.setattr(cls, "set_timesteps", lambda self, *_: setattr(self, "sigmas", torch.zeros(1)))
        made = cls.from_config(config)
        if schedule.rescale_betas_zero_snr:
            _rescale(made, cls.from_config({**config, "rescale_betas_zero_snr": False}).betas)
    return made


def _rescale(made: Any, betas: torch.Tensor) -> None:
    """Let the class's own function rescale in float64: in float32 it strays by 2e-5 where little is left."""
    if rescale := getattr(sys.modules[type(made).__module__], "rescale_zero_terminal_snr", None):
        left = torch.cumprod(1 - rescale(1 - (1 - betas).double()), dim=0).float()
        if made.alphas_cumprod[-1] > 0:
            left[-1] = made.alphas_cumprod[-1]
        made.alphas_cumprod = left


def reference(scheduler: Scheduler, schedule: NoiseSchedule) -> Any:
    """A fresh object of diffusers' class."""
    return deepcopy(_made(scheduler, schedule))


class _Double:
    """A module with float64 by the name of float32."""

    def __init__(self, module: Any) -> None:
        self._module, self.float32 = module, module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextmanager
def in_double(scheduler: Any) -> Iterator[None]:
    """Let the class compute in float64, from the alpha_bar that it has in float32."""
    module: Any = sys.modules[type(scheduler).__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch", _Double(torch))
        patch.setattr(module, "np", _Double(np), raising=False)
        yield


class _Floats:
    """A tensor of levels whose single ones are floats, on which LMS integrates without torch's pace."""

    def __init__(self, levels: torch.Tensor) -> None:
        self._levels, self._list = levels, levels.tolist()

    def __getitem__(self, index: int) -> float:
        value: float = self._list[index]
        return value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._levels, name)


def outputs(seed: int, calls: int) -> Array:
    return np.random.default_rng(seed).standard_normal((calls, *SHAPE))


def noises(seed: int) -> Iterator[Array]:
    """Standard normal noise for ever; the first is what x starts from."""
    generator = np.random.default_rng([seed, 1])
    while True:
        yield generator.standard_normal(SHAPE)


@contextmanager
def _drawing(scheduler: Any, noise: Iterator[Array]) -> Iterator[list[bool]]:
    """Let the class take its noise from `noise`, and tell when."""
    drawn: list[bool] = []

    def draw(*_: Any, dtype: torch.dtype, **__: Any) -> torch.Tensor:
        drawn.append(True)
        return torch.from_numpy(next(noise)).to(dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", draw, raising=False)
        yield drawn


def run_diffusers(
    scheduler: Scheduler, num_steps: int, schedule: NoiseSchedule, *, skip: int = 0, seed: int = 0, double: bool = True
) -> Run:
    """Loop over diffusers' class as its pipelines do, which with `skip` start from a picture.

    If `double`, it computes in float64; what remains of float32 is the noise schedule, as ours.
    """
    theirs, noise = reference(scheduler, schedule), noises(seed)
    with in_double(theirs) if double else nullcontext(), _drawing(theirs, noise) as drawn:
        if scheduler.timesteps is None:
            theirs.set_timesteps(num_steps)
        else:
            theirs.set_timesteps(timesteps=list(scheduler.timesteps))
        begin = skip * theirs.order
        if hasattr(theirs, "set_begin_index"):
            theirs.set_begin_index(begin)
        run = Run(float(theirs.init_noise_sigma))
        if double:
            for name in filter(theirs.__dict__.__contains__, ("alphas_cumprod", "final_alpha_cumprod")):
                setattr(theirs, name, getattr(theirs, name).double())
        if isinstance(theirs, LMSDiscreteScheduler):
            theirs.sigmas = _Floats(theirs.sigmas)
        dtype = torch.float64 if double else torch.float32
        extra = {} if scheduler.eta is None else {"eta": scheduler.eta}
        one, zero = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
        x = torch.from_numpy(next(noise)).to(dtype) * run.init_scale
        timesteps = theirs.timesteps[begin:]
        for t, model in zip(timesteps, outputs(seed, len(timesteps)), strict=True):
            signal, sigma = theirs.add_noise(one, zero, t[None]).item(), theirs.add_noise(zero, one, t[None]).item()
            run.levels.append((signal, sigma))
            run.timesteps.append(t.item())
            run.scales.append(theirs.scale_model_input(one, t).item())
            drawn.clear()
            step = theirs.step(torch.from_numpy(model).to(dtype), t, x, **extra)
            run.draws.append(bool(drawn))
            run.denoised += [x0.numpy() for x0 in _estimate(theirs, step, x, signal, sigma)]
            x = step.prev_sample
            run.xs.append(x.numpy())
    return run


def _estimate(scheduler: Any, step: Any, x: torch.Tensor, signal: float, sigma: float) -> list[torch.Tensor]:
    """The x0 behind the step just made, as far as the class tells."""
    if isinstance(scheduler, DEISMultistepScheduler):
        return [(x - sigma * scheduler.model_outputs[-1]) / signal]
    if hasattr(scheduler, "model_outputs"):
        return [scheduler.model_outputs[-1]]
    output = (getattr(step, name, None) for name in ("pred_original_sample", "denoised"))
    return [x0 for x0 in output if x0 is not None]


def run_table(
    scheduler: Scheduler, num_steps: int, schedule: NoiseSchedule, *, skip: int = 0, seed: int = 0, memory: float = 0.0
) -> Run:
    """Loop over our table, from memory lanes full of `memory`."""
    made, noise = table(scheduler, num_steps, schedule, skip=skip), noises(seed)
    run = Run(made.init_scale)
    x = made.init_scale * next(noise)
    lanes = [np.full(SHAPE, memory)] * MEMORY
    for step, model in zip(made.steps, outputs(seed, len(made.steps)), strict=True):
        fresh = next(noise) if step.draws else np.zeros(SHAPE)
        x, *lanes, denoised = np.tensordot(step.matrix, np.stack([x, model, fresh, *lanes]), axes=1)
        run.timesteps.append(step.timestep)
        run.scales.append(step.scale)
        run.levels.append(step.level)
        run.draws.append(step.draws)
        run.xs.append(x)
        run.denoised.append(denoised)
    return run


def apart(ours: Array, theirs: Array) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
