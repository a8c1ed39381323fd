"""The configs of each family are read as diffusers reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engines.checkpoints.diffusers_folder import CheckpointConfig
from engines.checkpoints.find import find_checkpoint
from engines.errors import CheckpointError
from tests.support.checkpoints import PARTS, Families, edit, load
from tests.support.tiny import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_found_and_loaded(families: Families, family: str) -> None:
    checkpoint = find_checkpoint(str(families(family)))
    assert checkpoint.name == family
    modules = load(checkpoint)
    assert all(not getattr(modules, part).training for part in PARTS)
    assert {weight.dtype for part in PARTS for weight in getattr(modules, part).parameters()} == {torch.float32}
    assert modules.text_encoder.config._attn_implementation == "sdpa"
    assert checkpoint.config.context.width == modules.unet.config.cross_attention_dim


def test_config_values_of_each_family(families: Families) -> None:
    configs = {family: find_checkpoint(str(families(family))).config for family in FAMILIES}
    assert configs["sd2"].noise_schedule.prediction_type == "v_prediction"
    assert [name for name, config in configs.items() if config.prefers_bf16] == ["sd2"]
    assert {name: config.guidance_embedding for name, config in configs.items()} == {
        **dict.fromkeys(FAMILIES),
        "lcm": 32,
        "lcm-xl": 32,
    }
    assert (configs["lcm"].scheduler, configs["sd2"].scheduler, configs["sd1"].scheduler) == ("lcm", "ddim", "pndm")


def test_zero_terminal_snr_is_read_into_the_noise_schedule(copied: Path) -> None:
    assert not CheckpointConfig(copied, "copy").noise_schedule.rescale_betas_zero_snr
    edit(copied / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    assert CheckpointConfig(copied, "copy").noise_schedule.rescale_betas_zero_snr


def test_1024_wide_prompt_embeddings_prefer_bf16(copied: Path) -> None:
    edit(copied / "unet" / "config.json", cross_attention_dim=1024)
    assert CheckpointConfig(copied, "copy").prefers_bf16


def test_an_unsupported_noise_schedule_is_refused(copied: Path) -> None:
    edit(copied / "scheduler" / "scheduler_config.json", beta_schedule="sigmoid")
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json: beta_schedule should be 'linear'"):
        find_checkpoint(str(copied))
