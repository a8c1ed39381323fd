"""What requests have by default: flags first, then the preset, then what the checkpoint says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engines.build import api
from engines.build.request_defaults.choice import notes_on_defaults, request_defaults
from engines.checkpoints.checkpoint import Checkpoint
from engines.errors import EngineError
from engines.manifest import Defaults
from tests.support.checkpoints import edit


def defaults(checkpoint: Checkpoint, **options: Any) -> Defaults:
    return request_defaults(checkpoint, api.ExportOptions(**options))


def notes(checkpoint: Checkpoint, **options: Any) -> list[str]:
    return list(notes_on_defaults(checkpoint, api.ExportOptions(**options)))


@pytest.fixture
def plain(checkpoint: Path) -> Checkpoint:
    return Checkpoint("tiny-sd", checkpoint)


@pytest.fixture
def turbo(checkpoint: Path, tmp_path: Path) -> Checkpoint:
    """As SD-Turbo is published."""
    copied = Path(shutil.copytree(checkpoint, tmp_path / "sd-turbo"))
    edit(copied / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    edit(
        copied / "scheduler" / "scheduler_config.json",
        _class_name="EulerDiscreteScheduler",
        timestep_spacing="trailing",
    )
    return Checkpoint("stabilityai/sd-turbo", copied)


@pytest.fixture
def with_lora(checkpoint: Path, tmp_path: Path) -> Checkpoint:
    file = tmp_path / "Hyper-SD15-4steps-lora.safetensors"
    save_file({"unet.x.lora_A.weight": torch.zeros(4, 16), "unet.x.lora_B.weight": torch.zeros(16, 4)}, file)
    return Checkpoint("tiny-sd", checkpoint, loras=(api.Lora(file),))


@pytest.fixture
def lcm(checkpoint: Path, tmp_path: Path) -> Checkpoint:
    """With a UNet that embeds the guidance scale, and the scheduler of the model it was distilled from."""
    copied = Path(shutil.copytree(checkpoint, tmp_path / "lcm"))
    edit(copied / "unet" / "config.json", time_cond_proj_dim=32)
    return Checkpoint("lcm", copied)


def test_without_any_the_defaults_are_those_of_diffusers(plain: Checkpoint) -> None:
    assert defaults(plain) == Defaults(scheduler="pndm", num_inference_steps=50, guidance_scale=7.5)
    assert notes(plain) == []


def test_turbo_has_its_own(turbo: Checkpoint) -> None:
    found = defaults(turbo)
    assert found == Defaults(scheduler="euler", num_inference_steps=1, guidance_scale=0.0, timestep_spacing="trailing")
    assert notes(turbo) == [
        "requests have the defaults of --preset turbo, by the name sd-turbo (--preset none: its own)"
    ]
    assert defaults(turbo, preset="none") == Defaults(scheduler="euler")
    assert notes(turbo, preset="none") == []


def test_a_lora_that_is_fused_brings_its_own(with_lora: Checkpoint) -> None:
    found = defaults(with_lora)
    assert (found.scheduler, found.num_inference_steps, found.guidance_scale) == ("ddim", 4, 0.0)
    assert "--preset hyper-4, by the LoRA Hyper-SD15-4steps-lora" in notes(with_lora)[0]
    assert notes(with_lora, preset="hyper-4") == []


def test_a_unet_that_embeds_its_guidance_takes_lcm(lcm: Checkpoint) -> None:
    assert defaults(lcm) == Defaults(scheduler="lcm", num_inference_steps=4, guidance_scale=8.5)
    assert defaults(lcm, preset="lcm") == Defaults(scheduler="lcm", num_inference_steps=4, guidance_scale=8.0)
    assert notes(lcm, preset="lcm") == []


def test_flags_replace_single_values_of_a_preset(plain: Checkpoint) -> None:
    usual = defaults(plain, preset="hyper-1")
    assert usual == Defaults(scheduler="tcd", num_inference_steps=1, guidance_scale=0.0, eta=1.0)
    assert defaults(plain, preset="hyper-1", steps=4) == usual.model_copy(update={"num_inference_steps": 4})
    assert defaults(plain, preset="hyper-1", guidance=1.5).guidance_scale == 1.5
    assert defaults(plain, preset="hyper-1", eta=0.3).eta == 0.3
    assert defaults(plain, preset="hyper-4", scheduler="euler_karras") == Defaults(
        scheduler="euler_karras", num_inference_steps=4, guidance_scale=0.0, timestep_spacing="trailing"
    )


def test_what_belongs_to_a_scheduler_goes_with_it(plain: Checkpoint) -> None:
    assert defaults(plain, preset="hyper-1", scheduler="ddim").eta is None
    assert defaults(plain, preset="hyper-4", scheduler="lcm").timestep_spacing is None


def test_timesteps_go_with_their_number_of_steps(xl_checkpoint: Path) -> None:
    xl = Checkpoint("tiny-xl", xl_checkpoint)
    assert defaults(xl, preset="hyper-1-unet").timesteps == (800,)
    assert defaults(xl, preset="hyper-1-unet", steps=2).timesteps is None
    assert defaults(xl, preset="dmd2", scheduler="tcd").timesteps is None
    assert defaults(xl, preset="turbo").scheduler == "euler_ancestral"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"preset": "lcm"}, "--preset lcm is for UNets that embed the guidance scale .* take --preset lcm-lora"),
        ({"preset": "lightning-4"}, "SDXL-Lightning, 4 steps, which is a Stable Diffusion XL, and tiny-sd is not"),
        ({"preset": "lcm-lora", "timestep_spacing": "trailing"}, "lcm has no timestep_spacing: leave it out"),
        ({"scheduler": "euler", "eta": 0.5}, "euler has no eta: leave it out, or choose one of ddim, tcd"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    plain: Checkpoint, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(EngineError, match=reason):
        defaults(plain, **options)


def test_latent_consistency_models_have_one_preset(lcm: Checkpoint) -> None:
    with pytest.raises(EngineError, match=r"whose UNet embeds the guidance scale: take --preset lcm\."):
        defaults(lcm, preset="turbo")


def test_a_preset_that_nothing_speaks_for_is_noted(plain: Checkpoint, with_lora: Checkpoint) -> None:
    assert "nothing in tiny-sd says that it is LCM-LoRA, and no LoRA is fused" in notes(plain, preset="lcm-lora")[0]
    assert (
        "--preset tcd is not the one of the LoRA Hyper-SD15-4steps-lora, which is hyper-4"
        in (notes(with_lora, preset="tcd")[0])
    )
