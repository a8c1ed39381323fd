"""diffusers behind the servers we compare with: the same requests and responses as ours.

Only the peers' interpreter imports it, which needs nothing else of this project.
"""

from __future__ import annotations

import argparse
import base64
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging
from PIL.Image import Image
from pydantic import BaseModel

# Our names of the benchmark's schedulers, and diffusers' classes and options for each.
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "unipc": (UniPCMultistepScheduler, {}),
}


class DiffusersRequest(BaseModel):
    """An image to generate; the defaults are those of the demo bundle."""

    prompt: str
    num_inference_steps: int = 20
    guidance_scale: float = 4.0
    scheduler: str = "dpmpp_2m"
    seed: int

    @property
    def kind(self) -> tuple[int, float, str]:
        """The parameters that all images of one pipeline call share."""
        return self.num_inference_steps, self.guidance_scale, self.scheduler


class DiffusersPipeline:
    """diffusers' StableDiffusionPipeline in FP32. Not thread-safe: its scheduler has state."""

    def __init__(self, checkpoint: Path, *, threads: int) -> None:
        torch.set_num_threads(threads)
        logging.disable_progress_bar()
        self._pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, local_files_only=True, safety_checker=None)
        self._pipeline.set_progress_bar_config(disable=True)
        self._published = self._pipeline.scheduler.config

    def generate(self, group: Sequence[DiffusersRequest]) -> list[Image]:
        """Images for a group of requests of one kind, by one call."""
        steps, guidance, scheduler = group[0].kind
        scheduler_class, settings = SCHEDULERS[scheduler]
        self._pipeline.scheduler = scheduler_class.from_config(self._published, **settings)
        images: list[Image] = self._pipeline(
            [body.prompt for body in group],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(body.seed) for body in group],
        ).images
        return images


def answer(image: Image, *, body: DiffusersRequest, queue: float, call: float) -> dict[str, Any]:
    """The fields of our server's response that the load test reads. The pipeline's call counts as denoising."""
    began = time.perf_counter()
    file = io.BytesIO()
    image.save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    stages = {"queue": queue, "encode": 0.0, "denoise": call, "decode": 0.0, "image": time.perf_counter() - began}
    return {"images": [{"seed": body.seed, "format": "png", "image": text}], "timings": stages}


def options(description: str | None) -> argparse.Namespace:
    """Command line of both servers."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--checkpoint", type=Path, required=True, help="diffusers folder to serve")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True, help="of torch")
    return parser.parse_args()
