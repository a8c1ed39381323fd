"""What a method makes: steps that are linear in x, the model's output, fresh noise and the memory.

A method writes its formulas over the basis vectors X, MODEL, NOISE, M1, M2, M3, for all its steps at once: levels and
times are columns [n, 1], so they read as in its paper, and what they compute are rows [n, TERMS] of the steps'
matrices, float64, on the host. Multiplying by the tensors is the device's work.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engines.contract import LANES, TERMS
from engines.manifest import NoiseSchedule
from engines.schedulers.levels import Sigmas, Spacing, Vector, Whole

FinalSigma = Literal["zero", "sigma_min"]

X, MODEL, NOISE, M1, M2, M3 = np.eye(TERMS)

NUMBERS = 4 + LANES * TERMS  # of a step: see Table.numbers
_IMAGE = (1.0, 0.0)  # signal and noise, when all steps are done
_LOWEST = -15.0  # log SNR in place of minus infinity, of checkpoints with zero terminal SNR


@dataclass(frozen=True, slots=True)
class Scheduler:
    """A method and its options: with a step count and a noise schedule, it decides a table."""

    method: str  # one of METHODS
    sigmas: Sigmas = "default"
    timestep_spacing: Spacing | None = None  # None: the checkpoint's, or the method's own
    final_sigmas_type: FinalSigma | None = None  # None: the checkpoint's, or zero
    eta: float | None = None  # fresh noise, from 0 to 1; None: the method's own
    timesteps: tuple[int, ...] | None = None  # falling, one per step; None: spaced by the method

    @property
    def name(self) -> str:
        """The method, and its levels if they are not its own: dpmpp_2m_karras."""
        return self.method if self.sigmas == "default" else f"{self.method}_{self.sigmas}"


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One UNet call and what it makes of the lanes.

    `matrix` is [LANES, TERMS] float64, read-only: rows x', m1', m2', m3', denoised over columns x, model,
    noise, m1, m2, m3. `denoised` is the method's estimate of x0, for previews; no later step reads it.
    No step reads a memory lane that none before it has written, so lanes may start as anything finite.
    """

    timestep: float  # the UNet's input
    scale: float  # c_in: the UNet sees scale * x
    matrix: NDArray[np.float64]
    level: tuple[float, float]  # signal, noise: weights with which diffusers adds noise to an image for this step
    draws: bool  # takes fresh noise, if only to multiply it by 0


@dataclass(frozen=True)
class Table:
    """A method compiled for one step count and noise schedule. x starts as `init_scale` times standard noise."""

    init_scale: float  # init_noise_sigma
    steps: tuple[Step, ...]  # one per UNet call

    @cached_property
    def draws(self) -> bool:
        """Whether any step takes fresh noise."""
        return any(step.draws for step in self.steps)

    @cached_property
    def log_snr(self) -> Vector:
        """The log of the signal-to-noise ratio, in variance, of x as the UNet sees it at each call: [n], at least -15.

        By `scale`, which brings x to unit variance: kdpm2 noises images for another level in the middle of a step.
        """
        scales, signals = np.array([(step.scale, step.level[0]) for step in self.steps]).T
        signal = (scales * signals) ** 2
        with np.errstate(divide="ignore"):
            ratios: Vector = np.maximum(np.log(signal / (1 - signal)), _LOWEST)
        ratios.setflags(write=False)
        return ratios

    @cached_property
    def numbers(self) -> tuple[NDArray[np.float32], ...]:
        """What a plan needs of each step, as one row [NUMBERS] that is copied whole: `timestep`, `scale`, the level
        that the step leads to, `matrix`."""
        levels = [*(step.level for step in self.steps[1:]), _IMAGE]
        rows = np.array(
            [
                (step.timestep, step.scale, *level, *step.matrix.flat)
                for step, level in zip(self.steps, levels, strict=True)
            ],
            np.float32,
        )
        rows.setflags(write=False)
        return tuple(rows)


@dataclass(frozen=True, slots=True)
class Setting:
    """All that decides a table."""

    scheduler: Scheduler
    num_steps: int
    schedule: NoiseSchedule
    skip: int  # how many of the steps are left out, from the first
    zero_snr: bool  # whether the last training timestep is nothing but noise

    @property
    def ends_at_zero(self) -> bool:
        return (self.scheduler.final_sigmas_type or self.schedule.final_sigmas_type) != "sigma_min"

    def spacing(self, usual: Spacing) -> Spacing:
        return self.scheduler.timestep_spacing or self.schedule.timestep_spacing or usual

    def predict(self, x: Vector, model: Vector, alpha: Vector, sigma: Vector) -> tuple[Vector, Vector]:
        """x0 and eps of x = alpha x0 + sigma eps; the model may tell v = alpha eps - sigma x0, Salimans & Ho (2022).

        alpha^2 + sigma^2 = 1. Raises ValueError where x is nothing but noise, and noise is all that the model tells.
        """
        match self.schedule.prediction_type:
            case "epsilon":
                if not alpha.all():
                    raise ValueError(
                        "This checkpoint's noise schedule leaves nothing of the image at its last timestep, where a "
                        "model that predicts the noise says nothing of it: ask for timestep_spacing leading, or euler."
                    )
                return (x - sigma * model) / alpha, model
            case "v_prediction":
                return alpha * x - sigma * model, alpha * model + sigma * x
            case "sample":
                return model, (x - alpha * model) / sigma


def make_steps(
    t: Vector | Whole,
    x: Vector,
    *memory: Vector,
    denoised: Vector,
    level: tuple[ArrayLike, ArrayLike],
    scale: ArrayLike = 1.0,
    draws: ArrayLike = False,
) -> tuple[Step, ...]:
    """One step per row of `t` [n, 1]. Lanes are [n, TERMS] or [TERMS], the rest [n, 1] or the same for all."""
    n = len(t)
    matrices = np.zeros((n, LANES, TERMS))
    for lane, row in enumerate((x, *memory)):
        matrices[:, lane] = row
    matrices[:, -1] = denoised
    matrices.setflags(write=False)
    columns = (
        np.broadcast_to(column, (n, 1))[:, 0].tolist() for column in (t.astype(np.float64), scale, *level, draws)
    )
    return tuple(
        Step(timestep, scale, matrix, (signal, noise), draws)
        for matrix, timestep, scale, signal, noise, draws in zip(matrices, *columns, strict=True)
    )
