"""What diffusers makes of the same checkpoint and the same words."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from numpy.typing import NDArray

Pixels = NDArray[np.float64]


_PUBLISHED = {"clip_sample": False}  # as SD checkpoints set it
_LEVELS: dict[str, dict[str, Any]] = {
    "": {},
    "_karras": {"use_karras_sigmas": True},
    "_exponential": {"use_exponential_sigmas": True},
    "_beta": {"use_beta_sigmas": True},
}
_SDE: dict[str, Any] = {"algorithm_type": "sde-dpmsolver++"}
# The class that each of our schedulers stands for, and how it is configured to be that one.
CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, _PUBLISHED),
    "ddpm": (DDPMScheduler, _PUBLISHED),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),  # likewise
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "tcd": (TCDScheduler, {}),
} | {
    f"{name}{suffix}": (kind, {**settings, **levels})
    for name, (kind, settings) in {
        "lms": (LMSDiscreteScheduler, {}),
        "euler": (EulerDiscreteScheduler, {}),
        "heun": (HeunDiscreteScheduler, {}),
        "kdpm2": (KDPM2DiscreteScheduler, {}),
        "kdpm2_ancestral": (KDPM2AncestralDiscreteScheduler, {}),
        "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
        "dpmpp_2m_sde": (DPMSolverMultistepScheduler, _SDE),
        "dpmpp_3m": (DPMSolverMultistepScheduler, {"solver_order": 3}),
        "dpmpp_3m_sde": (DPMSolverMultistepScheduler, {"solver_order": 3, **_SDE}),
        "dpmpp_2s": (DPMSolverSinglestepScheduler, {}),
        "dpmpp_3s": (DPMSolverSinglestepScheduler, {"solver_order": 3}),
        "deis": (DEISMultistepScheduler, {}),
        "unipc": (UniPCMultistepScheduler, {}),
    }.items()
    for suffix, levels in _LEVELS.items()
}
# What the pipeline is told beside: it hands TCD an eta of 0 unless told another, and TCD's documentation tells 0.3.
_TOLD = {"tcd": {"eta": 0.3}}


def load_pipeline(checkpoint: Path) -> Any:
    """diffusers' own pipeline over the checkpoint, in FP32."""
    is_xl = (checkpoint / "text_encoder_2").exists()
    kind, options = (StableDiffusionXLPipeline, {}) if is_xl else (StableDiffusionPipeline, {"safety_checker": None})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = kind.from_pretrained(checkpoint, torch_dtype=torch.float32, **options)
    pipeline.set_progress_bar_config(disable=True)
    # Where diffusers looks for the last layer norm if layers are skipped, and transformers 5 no longer has it.
    vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
    return pipeline


def draw(pipeline: Any, *, scheduler: str, seed: int, **options: Any) -> Pixels:
    """The picture [H, W, 3] in 0..255 that diffusers draws, with a scheduler made from the published one's config."""
    kind, settings = CLASSES[scheduler]
    output: dict[str, Any] = {**_TOLD.get(scheduler, {}), **options}
    published = PNDMScheduler.load_config(pipeline.config._name_or_path, subfolder="scheduler")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.scheduler = kind.from_config(published, **settings)
        result = pipeline(generator=torch.Generator("cpu").manual_seed(seed), output_type="np", **output)
    pixels: Pixels = np.round(result.images[0].astype(np.float64) * 255)
    return pixels
