"""The name that requests use for the scheduler a checkpoint was published with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def published_scheduler(config: Mapping[str, Any]) -> str | None:
    """Return the name of the scheduler that `config` describes, its sigmas included; None if it is not supported."""
    kind = config.get("_class_name", "")
    supported = _SOLVERS.get(kind, {})
    solver = {option: config.get(option, values[0]) for option, values in supported.items()}
    if kind not in _NAMES or any(config.get(option) for option in _UNSUPPORTED):
        return None
    if any(value not in supported[option] for option, value in solver.items()):
        return None
    sde = "_sde" if solver.get("algorithm_type") == "sde-dpmsolver++" else ""
    return _with_sigmas(_NAMES[kind].format(order=solver.get("solver_order"), sde=sde), config)


def _with_sigmas(name: str, config: Mapping[str, Any]) -> str:
    sigmas = next((kind for kind in ("karras", "exponential", "beta") if config.get(f"use_{kind}_sigmas")), None)
    return name if sigmas is None or name in _WITHOUT_SIGMAS else f"{name}_{sigmas}"
