"""What there is to choose from: the methods, and what may be asked of each."""

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
    """A method as callers see it."""

    name: str
    title: str  # AUTOMATIC1111's name, or one in its manner
    aliases: tuple[str, ...]  # more names that are taken for it: diffusers' class first, then older ones
    summary: str
    calls_per_step: int = 1  # of the UNet
    stochastic: bool = False  # draws fresh noise without being asked to
    sigmas: tuple[Sigmas, ...] = ("default",)
    options: tuple[Option, ...] = ("timestep_spacing",)
    predictions: tuple[Prediction, ...] = get_args(Prediction)


@dataclass(frozen=True, slots=True)
class Method:
    """A description with what it describes."""

    about: Description
    make: Callable[[Setting], Table]
    heeds_zero_snr: bool = (
        False  # whether its class in diffusers has the option; the others leave the betas as they are
    )


_LIST = (
    Method(
        Description(
            "ddim",
            "DDIM",
            ("DDIMScheduler",),
            "One straight step from each noise level to the next; eta mixes fresh noise in.",
            options=("timestep_spacing", "eta"),
        ),
        discrete.ddim,
        heeds_zero_snr=True,
    ),
    Method(
        Description(
            "ddpm",
            "DDPM",
            ("DDPMScheduler",),
            "The noising process run backwards, with fresh noise at every step; it needs many of them.",
            stochastic=True,
        ),
        discrete.ddpm,
        heeds_zero_snr=True,
    ),
    Method(
        Description(
            "pndm",
            "PLMS",
            ("PNDMScheduler",),
            "A linear multistep method of order 4, with which Stable Diffusion 1.x was published.",
            predictions=_OF_V_AND_EPSILON,
        ),
        discrete.pndm,
    ),
    Method(
        Description(
            "lms",
            "LMS",
            ("LMSDiscreteScheduler", "k_lms"),
            "A linear multistep method of order 4 in the noise level.",
            sigmas=_SIGMAS,
        ),
        sigma.lms,
    ),
    Method(
        Description(
            "euler",
            "Euler",
            ("EulerDiscreteScheduler", "k_euler"),
            "One straight step from each noise level to the next.",
            sigmas=_SIGMAS,
            options=("timestep_spacing", "final_sigmas_type"),
        ),
        sigma.euler,
        heeds_zero_snr=True,
    ),
    Method(
        Description(
            "euler_ancestral",
            "Euler a",
            ("EulerAncestralDiscreteScheduler", "Euler ancestral", "k_euler_a", "k_euler_ancestral"),
            "Euler with fresh noise at every step: more steps are another picture.",
            stochastic=True,
            predictions=_OF_V_AND_EPSILON,
        ),
        sigma.euler_ancestral,
        heeds_zero_snr=True,
    ),
    Method(
        Description(
            "heun",
            "Heun",
            ("HeunDiscreteScheduler", "k_heun"),
            "Euler, put right by the slope at the end of the step.",
            calls_per_step=2,
            sigmas=_SIGMAS,
        ),
        sigma.heun,
    ),
    Method(
        Description(
            "kdpm2",
            "DPM2",
            ("KDPM2DiscreteScheduler", "k_dpm_2"),
            "Each step by the slope halfway along it.",
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
            ("KDPM2AncestralDiscreteScheduler", "DPM2 ancestral", "k_dpm_2_a", "k_dpm_2_ancestral"),
            "DPM2 with fresh noise at every step: more steps are another picture.",
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
            "A multistep solver of order 2 made for guidance: good pictures in 20 steps.",
            sigmas=_SIGMAS,
            options=("timestep_spacing", "final_sigmas_type"),
        ),
        partial(multistep.dpmpp_multistep, order=2),
        heeds_zero_snr=True,
    ),
    Method(
        Description(
            "dpmpp_2m_sde",
            "DPM++ 2M SDE",
            ("k_dpmpp_2m_sde",),
            "DPM++ 2M with fresh noise at every step: more steps are another picture.",
            stochastic=True,
            sigmas=_SIGMAS,
            options=("timestep_spacing", "final_sigmas_type"),
        ),
        partial(multistep.dpmpp_multistep, order=2, sde=True),
        heeds_zero_snr=True,
    ),
    Method(
        Description(
            "dpmpp_3m",
            "DPM++ 3M",
            ("k_dpmpp_3m",),
            "A multistep solver of order 3, for little guidance.",
            sigmas=_SIGMAS,
            options=("timestep_spacing", "final_sigmas_type"),
        ),
        partial(multistep.dpmpp_multistep, order=3),
        heeds_zero_snr=True,
    ),
    Method(
        Description(
            "dpmpp_3m_sde",
            "DPM++ 3M SDE",
            ("k_dpmpp_3m_sde",),
            "DPM++ 3M with fresh noise at every step: more steps are another picture.",
            stochastic=True,
            sigmas=_SIGMAS,
            options=("timestep_spacing", "final_sigmas_type"),
        ),
        partial(multistep.dpmpp_multistep, order=3, sde=True),
        heeds_zero_snr=True,
    ),
    Method(
        Description(
            "dpmpp_2s",
            "DPM++ 2S",
            ("DPMSolverSinglestepScheduler", "k_dpmpp_2s"),
            "A solver of order 2 that remembers nothing from one pair of steps to the next.",
            sigmas=_SIGMAS,
            options=("final_sigmas_type",),
        ),
        partial(multistep.dpmpp_singlestep, order=2),
    ),
    Method(
        Description(
            "dpmpp_3s",
            "DPM++ 3S",
            ("k_dpmpp_3s",),
            "A solver of order 3 that remembers nothing from one three steps to the next.",
            sigmas=_SIGMAS,
            options=("final_sigmas_type",),
        ),
        partial(multistep.dpmpp_singlestep, order=3),
    ),
    Method(
        Description(
            "deis",
            "DEIS",
            ("DEISMultistepScheduler",),
            "A multistep method of order 2 over the predicted noise.",
            sigmas=_SIGMAS,
        ),
        multistep.deis,
    ),
    Method(
        Description(
            "unipc",
            "UniPC",
            ("UniPCMultistepScheduler",),
            "A multistep predictor of order 2, put right at the next call without a call of its own.",
            sigmas=_SIGMAS,
            options=("timestep_spacing", "final_sigmas_type"),
        ),
        multistep.unipc,
        heeds_zero_snr=True,
    ),
    Method(
        Description(
            "lcm",
            "LCM",
            ("LCMScheduler", "k_lcm"),
            "2 to 8 steps of a latent consistency model, with fresh noise between them.",
            stochastic=True,
            options=(),
        ),
        discrete.lcm,
        heeds_zero_snr=True,
    ),
    Method(
        Description(
            "tcd",
            "TCD",
            ("TCDScheduler",),
            "2 to 8 steps of a trajectory consistency model; eta, 0.3 by default, is how much noise is fresh.",
            stochastic=True,
            options=("eta",),
        ),
        discrete.tcd,
        heeds_zero_snr=True,
    ),
)
METHODS: Mapping[str, Method] = MappingProxyType({method.about.name: method for method in _LIST})
