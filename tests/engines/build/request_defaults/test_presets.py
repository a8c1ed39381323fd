"""Each preset is the recipe of its model card: what requests draw by default is what the card's own code draws."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

from engines.accuracy import psnr
from engines.backends.registry import open_device
from engines.build import api
from engines.build.request_defaults.choice import request_defaults
from engines.checkpoints.checkpoint import Checkpoint
from engines.manifest import Manifest
from server.requests.intake import Intake
from server.requests.request import Request
from server.requests.schemas import GenerateRequest
from server.requests.tokenizer import PromptTokenizer
from tests.support.executing import Asked, Running
from tests.support.references import Pixels, load_pipeline
from tests.support.shared import reused_graphs
from tests.support.tiny import make_checkpoint

PARITY = 45  # dB
SEED, PROMPT = 11, "two old boats at night"
TRAILING = {"timestep_spacing": "trailing"}


@dataclass(frozen=True)
class Recipe:
    """The code of a model card: `scheduler.from_config(pipe.scheduler.config, **config)`, then `pipe(**call)`."""

    scheduler: Any  # None: the pipeline's own
    call: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)

    def draw(self, pipeline: Any) -> Pixels:
        """The card's picture [H, W, 3] in 0..255."""
        published = pipeline.scheduler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.scheduler:
                pipeline.scheduler = self.scheduler.from_config(published.config, **self.config)
            made = pipeline(
                prompt=PROMPT, width=32, height=32, output_type="np", generator=torch.manual_seed(SEED), **self.call
            )
        pipeline.scheduler = published
        pixels: Pixels = np.round(made.images[0].astype(np.float64) * 255)
        return pixels


def few(steps: int, **others: Any) -> dict[str, Any]:
    return {"num_inference_steps": steps, "guidance_scale": 0.0, **others}


UNCLIPPED = {**TRAILING, "clip_sample": False}  # as the configs of published checkpoints say
OF_EVERY_FAMILY: dict[str, Recipe] = {
    **{f"hyper-{steps}": Recipe(DDIMScheduler, few(steps), UNCLIPPED) for steps in (2, 4, 8)},
    **{
        f"hyper-{steps}-cfg": Recipe(DDIMScheduler, {"num_inference_steps": steps, "guidance_scale": 5.0}, UNCLIPPED)
        for steps in (8, 12)
    },
    "hyper-1": Recipe(TCDScheduler, few(1, eta=1.0)),
    "lcm-lora": Recipe(LCMScheduler, few(4)),
    "tcd": Recipe(TCDScheduler, few(4, eta=0.3)),
    "sdxs": Recipe(None, few(1)),
}
OF_SD = {**OF_EVERY_FAMILY, "turbo": Recipe(EulerDiscreteScheduler, few(1), TRAILING)}
OF_XL = {
    **OF_EVERY_FAMILY,
    **{f"lightning-{steps}": Recipe(EulerDiscreteScheduler, few(steps), TRAILING) for steps in (2, 4, 8)},
    "turbo": Recipe(EulerAncestralDiscreteScheduler, few(1), TRAILING),
    "hyper-1-unet": Recipe(LCMScheduler, few(1, timesteps=[800])),
    "dmd2": Recipe(LCMScheduler, few(4, timesteps=[999, 749, 499, 249])),
    "dmd2-1": Recipe(LCMScheduler, few(1, timesteps=[399])),
}


# With one value changed, which has to show: tiny models with random weights draw much the same by all recipes.
CHANGED: dict[str, Recipe] = {
    "hyper-4": Recipe(DDIMScheduler, few(4), {"timestep_spacing": "leading", "clip_sample": False}),
    "hyper-8-cfg": Recipe(DDIMScheduler, {"num_inference_steps": 8, "guidance_scale": 7.5}, UNCLIPPED),
    "tcd": Recipe(TCDScheduler, few(4, eta=1.0)),
    "lcm-lora": Recipe(LCMScheduler, few(3)),
    "turbo": Recipe(EulerDiscreteScheduler, few(1), {"timestep_spacing": "leading"}),
}
CHANGED_XL = {
    "lightning-4": Recipe(EulerDiscreteScheduler, few(4), {"timestep_spacing": "leading"}),
    "hyper-1-unet": Recipe(LCMScheduler, few(1)),
    "dmd2-1": Recipe(LCMScheduler, few(1)),
}


def test_every_preset_has_a_recipe_here() -> None:
    assert {*OF_SD, *OF_XL, "lcm"} == {*api.PRESETS}


def tokenizer_of(bundle: Path) -> PromptTokenizer:
    manifest = Manifest.read(bundle)
    return PromptTokenizer(
        bundle / manifest.tokenizer.file.path,
        tokens=manifest.context.tokens,
        pad=manifest.tokenizer.pad,
        pad_2=manifest.tokenizer.pad_2,
    )


class Crowd:
    """One executor, which all presets' requests share at the same time, and the pictures that they get."""

    def __init__(self, bundle: Path, checkpoint: Path, presets: Mapping[str, Recipe]) -> None:
        self.pipeline, tokenizer = load_pipeline(checkpoint), tokenizer_of(bundle)
        manifest, asked = Manifest.read(bundle), {name: Asked() for name in presets}
        with Running(bundle, lambda: open_device("onnxruntime", threads=1)) as running:
            model, requests = running.models.default, list[Request]()
            for name, one in asked.items():
                options = api.ExportOptions(preset=name)
                defaults = request_defaults(Checkpoint(checkpoint.name, checkpoint), options)
                intake = Intake(manifest.model_copy(update={"defaults": defaults}), tokenizer, model=model.name)
                requests.append(intake.request(GenerateRequest(prompt=PROMPT, seed=SEED), one.hear))
            for request in requests:
                running.batcher.submit(request)
            self.pictures = {name: one.images()[0].astype(np.float64) for name, one in asked.items()}
            self.steps = running.metric("latentd_steps_total")


@pytest.fixture(scope="module")
def of_sd(bundle: Path, checkpoint: Path) -> Crowd:
    return Crowd(bundle, checkpoint, OF_SD)


@pytest.mark.parametrize("preset", OF_SD)
def test_sd_draws_the_picture_of_the_model_card(of_sd: Crowd, preset: str) -> None:
    theirs = OF_SD[preset].draw(of_sd.pipeline)
    assert theirs.std() > 3, "the reference is a flat picture: it proves nothing"
    assert psnr(of_sd.pictures[preset], theirs) >= PARITY


@pytest.mark.parametrize("preset", CHANGED)
def test_a_recipe_with_another_value_draws_another_picture(of_sd: Crowd, preset: str) -> None:
    assert psnr(of_sd.pictures[preset], CHANGED[preset].draw(of_sd.pipeline)) < PARITY


@pytest.fixture(scope="module")
def of_xl(xl_bundle: Path, xl_checkpoint: Path) -> Crowd:
    return Crowd(xl_bundle, xl_checkpoint, OF_XL)


@pytest.mark.parametrize("preset", OF_XL)
def test_xl_draws_the_picture_of_the_model_card(of_xl: Crowd, preset: str) -> None:
    theirs = OF_XL[preset].draw(of_xl.pipeline)
    assert theirs.std() > 3, "the reference is a flat picture: it proves nothing"
    assert psnr(of_xl.pictures[preset], theirs) >= PARITY


@pytest.mark.parametrize("preset", CHANGED_XL)
def test_a_recipe_of_xl_with_another_value_draws_another_picture(of_xl: Crowd, preset: str) -> None:
    assert psnr(of_xl.pictures[preset], CHANGED_XL[preset].draw(of_xl.pipeline)) < PARITY


LCM = Recipe(LCMScheduler, {"num_inference_steps": 4, "guidance_scale": 8.0})


@pytest.fixture(scope="module")
def of_lcm_xl(xl_bundle: Path, xl_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Crowd:
    """XL with a UNet that embeds the guidance scale. Prompts and images are encoded and decoded as those of XL."""
    folder = tmp_path_factory.mktemp("distilled")
    checkpoint, out = make_checkpoint(folder / "lcm-xl", "lcm-xl"), folder / "bundle"
    shutil.copytree(xl_checkpoint / "text_encoder_2", checkpoint / "text_encoder_2", dirs_exist_ok=True)
    with reused_graphs(xl_bundle, out, "encode_prompt", "decode", "encode_image"):
        source = api.CheckpointSource(str(checkpoint))
        api.build(source, out, backends=["onnxruntime"], options=api.ExportOptions(rows=(1,)), verify=False)
    return Crowd(out, checkpoint, {"lcm": LCM})


def test_lcm_of_xl_draws_the_picture_of_the_model_card(of_lcm_xl: Crowd) -> None:
    theirs = LCM.draw(of_lcm_xl.pipeline)
    assert theirs.std() > 3, "the reference is a flat picture: it proves nothing"
    assert psnr(of_lcm_xl.pictures["lcm"], theirs) >= PARITY


def test_requests_of_one_step_and_of_twelve_share_steps(of_sd: Crowd) -> None:
    calls = sum(recipe.call["num_inference_steps"] for recipe in OF_SD.values())
    assert of_sd.steps < calls
