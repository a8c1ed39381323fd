"""The sampling methods, and the options of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal, get_args

from engines.schedulers import discrete, multistep, sigma
from engines.schedulers.levels import Sigmas
from engines.schedulers.steps import Setting, Table

Option = Literal["timestep_spacing", "final_sigmas_type", "eta"]
Prediction = Literal["epsilon", "v_prediction", "sample"]

_SIGMAS: tuple[Sigmas, ...] = get_args(Sigmas)
_OF_V_AND_EPSILON: tuple[Prediction, ...] = ("epsilon", "v_prediction")


@dataclass(frozen=True, slots=True)
class Description:
    """A method, as `GET /schedulers` describes it."""

    name: str
    title: str  # AUTOMATIC1111's name, or one like it
    aliases: tuple[
        str, ...
    ]  # other accepted names: diffusers' class first, then those of k-diffusion, ComfyUI, InvokeAI
    summary: str
    calls_per_step: int = 1  # UNet calls
    stochastic: bool = False  # takes fresh noise by default
    sigmas: tuple[Sigmas, ...] = ("default",)
    options: tuple[Option, ...] = ("timestep_spacing",)
    predictions: tuple[Prediction, ...] = get_args(Prediction)


@dataclass(frozen=True, slots=True)
class Method:
    """A description, and the function that compiles its tables."""

    about: Description
    make: Callable[[Setting], Table]
    supports_zero_snr: bool = False  # whether its class in diffusers has rescale_betas_zero_snr; others ignore it
    takes_timesteps: bool = False  # whether it steps through given timesteps
    steps_at_once: int = 1  # of a singlestep solver: diffusers counts as steps the calls that make one together


_LIST = (
    Method(
        Description(
            "ddim",
            "DDIM",
            ("DDIMScheduler",),
            "A first-order step from each noise level to the next; eta adds fresh noise.",
            options=("timestep_spacing", "eta"),
        ),
        discrete.ddim,
        supports_zero_snr=True,
    ),
    Method(
        Description(
            "ddpm",
            "DDPM",
            ("DDPMScheduler",),
            "The reverse of the noising process, with fresh noise at every step; it needs many steps.",
            stochastic=True,
        ),
        discrete.ddpm,
        supports_zero_snr=True,
    ),
    Method(
        Description(
            "pndm",
            "PLMS",
            ("PNDMScheduler",),
            "A fourth-order linear multistep method; the default of Stable Diffusion 1.x.",
            predictions=_OF_V_AND_EPSILON,
        ),
        discrete.pndm,
    ),
    Method(
        Description(
            "lms",
            "LMS",
            ("LMSDiscreteScheduler", "k_lms"),
            "A fourth-order linear multistep method in sigma.",
            sigmas=_SIGMAS,
        ),
        sigma.lms,
    ),
    Method(
        Description(
            "euler",
            "Euler",
            ("EulerDiscreteScheduler", "k_euler"),
            "A first-order step from each noise level to the next.",
            sigmas=_SIGMAS,
            options=("timestep_spacing", "final_sigmas_type"),
        ),
        sigma.euler,
        supports_zero_snr=True,
    ),
    Method(
        Description(
            "euler_ancestral",
            "Euler a",
            ("EulerAncestralDiscreteScheduler", "Euler ancestral", "k_euler_a", "k_euler_ancestral"),
            "Euler with fresh noise at every step; each step count gives another image.",
            stochastic=True,
            predictions=_OF_V_AND_EPSILON,
        ),
        sigma.euler_ancestral,
        supports_zero_snr=True,
    ),
    Method(
        Description(
            "heun",
            "Heun",
            ("HeunDiscreteScheduler", "k_heun"),
            "Euler, corrected by the slope at the end of each step.",
            calls_per_step=2,
            sigmas=_SIGMAS,
        ),
        sigma.heun,
    ),
    Method(
        Description(
            "kdpm2",
            "DPM2",
            ("KDPM2DiscreteScheduler", "k_dpm_2", "kdpm_2"),
            "A step by the slope at its midpoint.",
            calls_per_step=2,
            sigmas=_SIGMAS,
            predictions=_OF_V_AND_EPSILON,
        ),
        sigma.kdpm2,
    ),
    Method(
        Description(
            "kdpm2_ancestral",
            "DPM2 a",
            ("KDPM2AncestralDiscreteScheduler", "DPM2 ancestral", "k_dpm_2_a", "k_dpm_2_ancestral", "kdpm_2_a"),
            "DPM2 with fresh noise at every step; each step count gives another image.",
            calls_per_step=2,
            stochastic=True,
            sigmas=_SIGMAS,
            predictions=_OF_V_AND_EPSILON,
        ),
        partial(sigma.kdpm2, ancestral=True),
    ),
    Method(
        Description(
            "dpmpp_2m",
            "DPM++ 2M",
            ("DPMSolverMultistepScheduler", "k_dpmpp_2m"),
            "A second-order multistep solver for guided sampling; good images in 20 steps.",
            sigmas=_SIGMAS,
            options=("timestep_spacing", "final_sigmas_type"),
        ),
        partial(multistep.dpmpp_multistep, order=2),
        supports_zero_snr=True,
    ),
    Method(
        Description(
            "dpmpp_2m_sde",
            "DPM++ 2M SDE",
            ("k_dpmpp_2m_sde", "dpmpp_2m_sde_gpu"),
            "DPM++ 2M with fresh noise at every step; each step count gives another image.",
            stochastic=True,
            sigmas=_SIGMAS,
            options=("timestep_spacing", "final_sigmas_type"),
        ),
        partial(multistep.dpmpp_multistep, order=2, sde=True),
        supports_zero_snr=True,
    ),
    Method(
        Description(
            "dpmpp_3m",
            "DPM++ 3M",
            ("k_dpmpp_3m",),
            "A third-order multistep solver, for low guidance scales.",
            sigmas=_SIGMAS,
            options=("timestep_spacing", "final_sigmas_type"),
        ),
        partial(multistep.dpmpp_multistep, order=3),
        supports_zero_snr=True,
    ),
    Method(
        Description(
            "dpmpp_3m_sde",
            "DPM++ 3M SDE",
            ("k_dpmpp_3m_sde", "dpmpp_3m_sde_gpu"),
            "DPM++ 3M with fresh noise at every step; each step count gives another image.",
            stochastic=True,
            sigmas=_SIGMAS,
            options=("timestep_spacing", "final_sigmas_type"),
        ),
        partial(multistep.dpmpp_multistep, order=3, sde=True),
        supports_zero_snr=True,
    ),
    Method(
        Description(
            "dpmpp_2s",
            "DPM++ 2S",
            ("DPMSolverSinglestepScheduler", "k_dpmpp_2s"),
            "A second-order singlestep solver: no history between pairs of steps.",
            sigmas=_SIGMAS,
            options=("final_sigmas_type",),
        ),
        partial(multistep.dpmpp_singlestep, order=2),
        steps_at_once=2,
    ),
    Method(
        Description(
            "dpmpp_3s",
            "DPM++ 3S",
            ("k_dpmpp_3s",),
            "A third-order singlestep solver: no history between groups of three steps.",
            sigmas=_SIGMAS,
            options=("final_sigmas_type",),
        ),
        partial(multistep.dpmpp_singlestep, order=3),
        steps_at_once=3,
    ),
    Method(
        Description(
            "deis",
            "DEIS",
            ("DEISMultistepScheduler",),
            "A second-order multistep method in the predicted noise.",
            sigmas=_SIGMAS,
        ),
        multistep.deis,
    ),
    Method(
        Description(
            "unipc",
            "UniPC",
            ("UniPCMultistepScheduler",),
            "A second-order multistep predictor-corrector; the corrector needs no extra UNet call.",
            sigmas=_SIGMAS,
            options=("timestep_spacing", "final_sigmas_type"),
        ),
        multistep.unipc,
        supports_zero_snr=True,
    ),
    Method(
        Description(
            "lcm",
            "LCM",
            ("LCMScheduler", "k_lcm"),
            "For latent consistency models: 2 to 8 steps with fresh noise in between.",
            stochastic=True,
            options=(),
        ),
        discrete.lcm,
        supports_zero_snr=True,
        takes_timesteps=True,
    ),
    Method(
        Description(
            "tcd",
            "TCD",
            ("TCDScheduler",),
            "For trajectory consistency models: 2 to 8 steps; eta, 0.3 by default, is the share of fresh noise.",
            stochastic=True,
            options=("eta",),
        ),
        discrete.tcd,
        supports_zero_snr=True,
        takes_timesteps=True,
    ),
)
METHODS: Mapping[str, Method] = MappingProxyType({method.about.name: method for method in _LIST})
