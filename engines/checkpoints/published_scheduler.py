"""The scheduler a checkpoint was published with: its name in requests, its noise schedule, what is not followed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from engines.checkpoints.configs import SchedulerConfig
from engines.manifest import NoiseSchedule

# By diffusers' class; {order} and {sde} come from its config.
_NAMES = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepScheduler": "dpmpp_{order}m{sde}",
    "DPMSolverSinglestepScheduler": "dpmpp_{order}s",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "kdpm2_ancestral",
    "KDPM2DiscreteScheduler": "kdpm2",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "unipc",
}
_WITHOUT_SIGMAS = ("ddim", "ddpm", "euler_ancestral", "lcm", "pndm", "tcd")  # their classes ignore use_karras_sigmas …
# The values of solver options that are supported, the class's default first. A class reads names of other classes'
# solvers as its own default, so those are listed too.
_SOLVERS: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "DEISMultistepScheduler": {"solver_order": (2,)},
    "DPMSolverMultistepScheduler": {
        "solver_order": (2, 3),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
    },
    "DPMSolverSinglestepScheduler": {
        "solver_order": (2, 3),
        "algorithm_type": ("dpmsolver++", "deis"),
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
    },
    "UniPCMultistepScheduler": {
        "solver_order": (2,),
        "solver_type": ("bh2", "midpoint", "heun", "logrho"),
        "predict_x0": (True,),
    },
}
_UNSUPPORTED = ("thresholding", "use_lu_lambdas", "use_flow_sigmas", "disable_corrector")  # when set
# Options that no scheduler here follows, whatever the class, and the values that they need not follow.
_IGNORED: Mapping[str, tuple[object, ...]] = {
    "clip_sample": (False,),  # diffusers' StableDiffusionPipeline does not follow it either
    "euler_at_final": (False,),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (float("-inf"), "-Infinity"),
    "lower_order_final": (True,),
    "original_inference_steps": (50,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "skip_prk_steps": (True,),
    "solver_p": (None,),
    "timestep_scaling": (10,),
    "timestep_type": ("discrete",),
    "use_dynamic_shifting": (False,),
    "variance_type": ("fixed_small", None),
}
# The betas that a class has by default: start, end, schedule. Others have those of `_USUAL_BETAS`.
_USUAL_BETAS = (0.0001, 0.02, "linear")
_BETAS = {
    "HeunDiscreteScheduler": (0.00085, 0.012, "linear"),
    "KDPM2AncestralDiscreteScheduler": (0.00085, 0.012, "linear"),
    "KDPM2DiscreteScheduler": (0.00085, 0.012, "linear"),
    "LCMScheduler": (0.00085, 0.012, "scaled_linear"),
    "TCDScheduler": (0.00085, 0.012, "scaled_linear"),
}
_LOWER_ORDER_ANYWAY = ("DPMSolverSinglestepScheduler",)  # false by default
_WITHOUT_OFFSET = ("DPMSolverSinglestepScheduler",)  # the class has no steps_offset


def published_scheduler(kind: str, config: Mapping[str, Any]) -> str | None:
    """Return the name of the scheduler of class `kind` with `config`, its sigmas included; None if not supported."""
    if unsupported_reason(kind, config):
        return None
    solver = _solver(kind, config)
    sde = "_sde" if solver.get("algorithm_type") == "sde-dpmsolver++" else ""
    return _with_sigmas(_NAMES[kind].format(order=solver.get("solver_order"), sde=sde), config)


def unsupported_reason(kind: str, config: Mapping[str, Any]) -> str | None:
    """Return the class, or the option with its value, for which the scheduler is not supported; None if it is."""
    if kind not in _NAMES:
        return f"the scheduler {kind}"
    wrong = [option for option in _UNSUPPORTED if config.get(option)]
    wrong += [option for option, value in _solver(kind, config).items() if value not in _SOLVERS[kind][option]]
    return _shown(wrong[0], config[wrong[0]]) if wrong else None


def ignored_options(kind: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the options in the config of a scheduler of class `kind` that are not followed, each with its value."""
    for option, followed in _IGNORED.items():
        usual = option == "lower_order_final" and kind in _LOWER_ORDER_ANYWAY
        if option in config and config[option] not in followed and not usual:
            yield _shown(option, config[option])


def noise_schedule(config: SchedulerConfig, kind: str, *, corrected: bool) -> NoiseSchedule:
    """Return the noise schedule of a scheduler of class `kind`.

    `corrected` is whether diffusers' pipeline sets an outdated `steps_offset`, absent or other than 1, to 1.
    """
    start, end, schedule = _BETAS.get(kind, _USUAL_BETAS)
    defaults = {"beta_start": start, "beta_end": end, "beta_schedule": schedule}
    given = config.model_dump(exclude_none=True)
    if corrected and ("steps_offset" in given or kind not in _WITHOUT_OFFSET):
        given["steps_offset"] = 1
    return NoiseSchedule.model_validate({**defaults, **given})


def _solver(kind: str, config: Mapping[str, Any]) -> dict[str, object]:
    return {option: config.get(option, values[0]) for option, values in _SOLVERS.get(kind, {}).items()}


def _shown(option: str, value: object) -> str:
    return f"{option} {json.dumps(value)[:60]}"


def _with_sigmas(name: str, config: Mapping[str, Any]) -> str:
    sigmas = next((kind for kind in ("karras", "exponential", "beta") if config.get(f"use_{kind}_sigmas")), None)
    return name if sigmas is None or name in _WITHOUT_SIGMAS else f"{name}_{sigmas}"
