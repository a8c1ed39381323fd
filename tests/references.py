"""What diffusers makes of the same checkpoint and the same words."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from numpy.typing import NDArray

Pixels = NDArray[np.float64]


# The class that each of our schedulers stands for, and how it is configured to be that one.
CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),  # as published SD checkpoints set it
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "pndm": (PNDMScheduler, {}),
}


def psnr(one: Pixels, other: Pixels) -> float:
    """Peak signal-to-noise ratio of two pictures in 0..255, in dB."""
    error = float(np.mean((one - other) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def load_pipeline(checkpoint: Path) -> Any:
    """diffusers' own pipeline over the checkpoint, in FP32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, *, scheduler: str, seed: int, **options: Any) -> Pixels:
    """The picture [H, W, 3] in 0..255 that diffusers draws, with a scheduler made from the published one's config."""
    kind, settings = CLASSES[scheduler]
    published = PNDMScheduler.load_config(pipeline.config._name_or_path, subfolder="scheduler")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.scheduler = kind.from_config(published, **settings)
        result = pipeline(generator=torch.Generator("cpu").manual_seed(seed), output_type="np", **options)
    pixels: Pixels = np.round(result.images[0].astype(np.float64) * 255)
    return pixels
