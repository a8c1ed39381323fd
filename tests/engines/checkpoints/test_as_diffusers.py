"""Configs are read as diffusers' pipeline reads them: the same size, noise schedule, timesteps and defaults."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from pydantic import BaseModel
from transformers import CLIPTextConfig

from engines.checkpoints.configs import TextEncoderConfig, UnetConfig, VaeConfig
from engines.checkpoints.diffusers_folder import CheckpointConfig
from engines.checkpoints.loading.libraries import quiet
from engines.schedulers import find, table
from tests.support.checkpoints import edit

SCHEDULER = "scheduler/scheduler_config.json"
OLD = {"_diffusers_version": "0.6.0"}
Edits = dict[str, dict[str, Any]]


def scheduler_of(kind: str, **config: Any) -> Edits:
    return {"model_index.json": {"scheduler": ["diffusers", kind]}, SCHEDULER: {"_class_name": kind, **config}}


@pytest.fixture(scope="module")
def parts(families: Callable[[str], Path]) -> dict[str, Any]:
    """The parts with weights, which are loaded once; configs are read for each test."""
    with quiet():
        pipeline = DiffusionPipeline.from_pretrained(families("sd1"))
    return {"vae": pipeline.vae, "text_encoder": pipeline.text_encoder}


@pytest.mark.parametrize(
    "edits",
    [
        {},
        {SCHEDULER: {"steps_offset": 0}},
        {SCHEDULER: {"steps_offset": None}},  # absent
        {SCHEDULER: {"steps_offset": 7, "clip_sample": True}},
        {SCHEDULER: {"beta_start": None, "beta_end": None, "beta_schedule": None}},
        {SCHEDULER: {"num_train_timesteps": None, "set_alpha_to_one": None, "prediction_type": None}},
        {"unet/config.json": OLD},
        {"unet/config.json": {**OLD, "sample_size": 32}},
        {"unet/config.json": {**OLD, "sample_size": 96}},
        {"unet/config.json": {**OLD, "sample_size": [32, 24]}},
        {"unet/config.json": {"_diffusers_version": "0.8.1.dev0", "sample_size": 32}},
        {"unet/config.json": {"_diffusers_version": "0.9.0.dev0", "sample_size": 32}},
        {"unet/config.json": {"_diffusers_version": None, "sample_size": 32}},
        {
            "model_index.json": {"_class_name": "StableDiffusionImg2ImgPipeline"},
            "unet/config.json": OLD,
            SCHEDULER: {"steps_offset": 0},
        },
        {
            "model_index.json": {
                "_class_name": "LatentConsistencyModelPipeline",
                "scheduler": ["diffusers", "LCMScheduler"],
            },
            "unet/config.json": OLD,
            SCHEDULER: {"_class_name": "LCMScheduler", "steps_offset": 0},
        },
        {SCHEDULER: {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}},  # the index names PNDM
        scheduler_of("DDIMScheduler", steps_offset=None, beta_schedule=None),
        scheduler_of("EulerDiscreteScheduler", steps_offset=0, timestep_spacing="leading"),
        scheduler_of("HeunDiscreteScheduler", beta_start=None, beta_end=None),
        scheduler_of("KDPM2DiscreteScheduler", beta_start=None, beta_end=None, timestep_spacing="leading"),
        scheduler_of("UniPCMultistepScheduler", steps_offset=None, timestep_spacing="leading"),
        scheduler_of("DPMSolverMultistepScheduler", beta_start=None, beta_end=None, beta_schedule=None),
        scheduler_of("DPMSolverSinglestepScheduler", steps_offset=None),
        scheduler_of("DPMSolverSinglestepScheduler", steps_offset=0),
    ],
    ids=lambda edits: json.dumps(edits)[:150],
)
@pytest.mark.filterwarnings("ignore:__array_")  # of torch with numpy 2
def test_size_noise_schedule_and_timesteps_are_those_of_the_pipeline(
    copied: Path, parts: dict[str, Any], edits: Edits
) -> None:
    for file, changes in edits.items():
        edit(copied / file, **changes)
        without(copied / file, [key for key, value in changes.items() if value is None])
    pipeline, ours = pipeline_of(copied, parts), CheckpointConfig(copied, "copy")
    scheduler, schedule = pipeline.scheduler, ours.noise_schedule
    assert (ours.size.height, ours.size.width) == default_size(pipeline)
    np.testing.assert_allclose(betas(schedule), scheduler.betas, rtol=1e-5)
    assert schedule.steps_offset == scheduler.config.get("steps_offset", 0)
    assert scheduler.config.get("clip_sample", False) is False
    scheduler.set_timesteps(10)
    steps = table(find(ours.scheduler), 10, schedule).steps
    np.testing.assert_allclose([step.timestep for step in steps], scheduler.timesteps, rtol=1e-5)


def pipeline_of(folder: Path, parts: dict[str, Any]) -> Any:
    with quiet():
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        return DiffusionPipeline.from_pretrained(folder, unet=unet, **parts)


def default_size(pipeline: Any) -> tuple[int, int]:
    """Height and width of an image of a request that names none, as the pipelines compute them in __call__."""
    sample, scale = pipeline.unet.config.sample_size, pipeline.vae_scale_factor
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return height * scale, width * scale


def betas(schedule: Any) -> Any:
    return diffusers.DDIMScheduler(
        num_train_timesteps=schedule.num_train_timesteps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule=schedule.beta_schedule,
    ).betas


def without(path: Path, keys: list[str]) -> None:
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in keys}))


@pytest.mark.parametrize(
    ("config", "library"), [(UnetConfig, UNet2DConditionModel), (VaeConfig, AutoencoderKL), (TextEncoderConfig, None)]
)
def test_absent_keys_have_the_defaults_of_the_library(config: type[BaseModel], library: Any) -> None:
    if library is None:
        theirs = CLIPTextConfig().to_dict()
    else:
        theirs = {name: one.default for name, one in inspect.signature(library.__init__).parameters.items()}
    ours = {name: field.default for name, field in config.model_fields.items() if name in theirs}
    assert len(ours) >= len(config.model_fields) - 2  # without _diffusers_version and quantization_config
    assert {name: value for name, value in ours.items() if name != "sample_size"} == {
        name: theirs[name] for name in ours if name != "sample_size"
    }
