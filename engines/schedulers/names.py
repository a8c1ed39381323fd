"""What schedulers are called: by us, by diffusers, and by the programs that use k-diffusion.

A name of another program is accepted where the method is the same, as diffusers implements it. Where there is no such
method, or another of the same name, the error says why, and which is nearest; nothing is replaced silently.
"""

from __future__ import annotations

import difflib
import re

from engines.schedulers.levels import Sigmas
from engines.schedulers.methods import METHODS
from engines.schedulers.steps import Scheduler

_SEPARATORS = re.compile(r"[\s_-]+")
_ENDINGS: dict[str, Sigmas] = {
    "default": "default",
    "karras": "karras",
    "exponential": "exponential",
    "beta": "beta",
    "ka": "karras",  # AUTOMATIC1111's API
    "exp": "exponential",
    "k": "karras",  # InvokeAI
}

_BROWNIAN = "its noise comes from a Brownian tree, which torch's seeds do not replay: take dpmpp_2m_sde."
_NO_CLASS = "diffusers has no class of it to compare with:"
_OTHER_MODELS = "it is for models of another kind, and this one is a Stable Diffusion 1.x or 2.x."
_OWN_LEVELS = "its noise levels are its own, whatever the checkpoint was trained with: take lms."
_INVERSE = "it leads from images to noise."
_METHODS = {  # that there are not, and the reason
    ("DPM++ SDE", "DPM++ SDE gpu", "DPMSolverSDEScheduler"): _BROWNIAN,
    ("DPM adaptive", "DPM ad"): "it adapts its steps to the image, and a table needs them in advance: take dpmpp_3m.",
    ("DPM fast",): f"{_NO_CLASS} take dpmpp_3s.",
    ("DPM++ 2S a", "DPM++ 2S ancestral"): f"{_NO_CLASS} take dpmpp_2s or euler_ancestral.",
    ("DPM++ 2M SDE Heun", "DPM++ 2M SDE Heun gpu"): "its correction is Heun's, and here the midpoint's: take "
    "dpmpp_2m_sde.",
    ("uni_pc",): "in ComfyUI it is of order 3 with B1(h), and here of order 2 with B2(h), as in diffusers: take unipc.",
    ("uni_pc_bh2",): "in ComfyUI it is of order 3, and here of order 2, as in diffusers: take unipc.",
    ("Restart",): f"{_NO_CLASS} take heun.",
    ("heunpp2", "exp_heun_2_x0"): f"{_NO_CLASS} take heun.",
    ("exp_heun_2_x0_sde", "er_sde", "seeds_2", "seeds_3"): f"{_NO_CLASS} take dpmpp_2m_sde.",
    ("res_multistep", "gradient_estimation"): f"{_NO_CLASS} take dpmpp_2m.",
    ("res_multistep_ancestral",): f"{_NO_CLASS} take euler_ancestral.",
    ("sa_solver", "sa_solver_pece", "SASolverScheduler"): "SA-Solver is not supported: take dpmpp_2m_sde.",
    ("IPNDMScheduler", "ipndm_v"): _OWN_LEVELS,
    ("DDIMParallelScheduler",): "its steps are those of DDIM: take ddim.",
    ("DDPMParallelScheduler",): "its steps are those of DDPM: take ddpm.",
    ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"): _INVERSE,
    (
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
        "CMStochasticIterativeScheduler",
        "CosineDPMSolverMultistepScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
    ): _OTHER_MODELS,
}
_LEVELS = {  # of ComfyUI and AUTOMATIC1111, where they are chosen apart from the method
    ("karras", "exponential", "beta"): "send the method, and this as sigmas.",
    ("normal", "uniform"): "send the method, and timestep_spacing linspace, which is nearest.",
    ("sgm_uniform", "simple"): "send the method, and timestep_spacing trailing, which is nearest.",
    ("ddim_uniform",): "send the method, and timestep_spacing leading, which is nearest.",
    ("automatic",): "send the method alone: its levels are the checkpoint's.",
    ("polyexponential", "kl_optimal", "align_your_steps", "linear_quadratic", "turbo"): "there are no such levels: "
    "send the method, and sigmas karras, exponential or beta.",
}


def _key(name: str) -> str:
    """What two spellings of a name share: "k_dpmpp_2m", "DPM++ 2M"."""
    words = _SEPARATORS.sub(" ", name.casefold().replace("++", "pp")).strip()
    return words.removeprefix("sample ").removeprefix("k ").removesuffix("scheduler").strip()


_ACCEPTED = {
    _key(alias): name for name, method in METHODS.items() for alias in (name, method.about.title, *method.about.aliases)
}
_REASONS = {_key(name): reason for names, reason in _METHODS.items() for name in names}
_ADVICE = {_key(name): advice for names, advice in _LEVELS.items() for name in names}
_SUGGESTED = {
    _key(f"{alias} {sigmas}" if sigmas != "default" else alias): Scheduler(method, sigmas).name
    for alias, method in _ACCEPTED.items()
    for sigmas in METHODS[method].about.sigmas
}


def resolve(name: str) -> tuple[str, Sigmas | None]:
    """The method that `name` means, and the sigmas if the name ends in some.

    Raises ValueError, with an alternative, for an unknown name.
    """
    key = _key(name)
    base, ending = _split(key)
    if method := _ACCEPTED.get(base):
        return method, ending
    if reason := _REASONS.get(base) or _reason(key):
        raise ValueError(f"{name} is unavailable: {reason}")
    raise ValueError(_unknown(name, key))


def _split(key: str) -> tuple[str, Sigmas | None]:
    base, _, ending = key.rpartition(" ")
    if key in _ACCEPTED or ending not in _ENDINGS or not base:
        return key, None
    return base, _ENDINGS[ending]


def _reason(key: str) -> str | None:
    """Why there is no such combination of a method and what other programs combine with methods."""
    if "cfgpp" in key or "cfg pp" in key:
        plain = _ACCEPTED.get(_key(key.replace("cfgpp", "").replace("cfg pp", "")))
        return f"CFG++ is another guidance, and there is only the usual one: take {plain or 'dpmpp_2m'}."
    if key in _ADVICE:
        return f"it names noise levels, and scheduler the method: {_ADVICE[key]}"
    for levels, advice in _ADVICE.items():
        if method := _ACCEPTED.get(key.removesuffix(levels).strip()):
            return advice.replace("the method", method)
    return None


def _unknown(name: str, key: str) -> str:
    near = difflib.get_close_matches(key, [*_SUGGESTED, *_REASONS], n=1)
    if near and near[0] in _REASONS:
        return f"unknown scheduler {name!r}: {near[0]} is unavailable: {_REASONS[near[0]]}"
    hint = f"did you mean {_SUGGESTED[near[0]]}? There are" if near else "choose one of"
    return (
        f"unknown scheduler {name!r}: {hint} {', '.join(METHODS)}, many of them with karras, exponential or beta "
        "levels, as in dpmpp_2m_karras."
    )
