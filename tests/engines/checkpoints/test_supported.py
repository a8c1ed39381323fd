"""Folders with models that are not supported are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.checkpoints.find import find_checkpoint
from engines.errors import CheckpointError
from tests.support.checkpoints import edit


@pytest.mark.parametrize(
    ("file", "changes", "complaint"),
    [
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "StableDiffusion3Pipeline"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, "StableDiffusionInpaintPipeline"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny as vae"),
        ("model_index.json", {"tokenizer": ["transformers", "T5Tokenizer"]}, "T5Tokenizer as tokenizer"),
        ("unet/config.json", {"in_channels": 9}, r"9 input channels \(inpainting\)"),
        ("unet/config.json", {"in_channels": 5}, r"5 input channels \(depth"),
        ("unet/config.json", {"in_channels": 7}, r"7 input channels \(upscaling"),
        ("unet/config.json", {"class_embed_type": "projection"}, "class_embed_type 'projection'"),
        ("unet/config.json", {"num_class_embeds": 1000}, "num_class_embeds 1000"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type 'text_time'"),
        ("unet/config.json", {"encoder_hid_dim": 4096}, "encoder_hid_dim 4096"),
        ("unet/config.json", {"cross_attention_dim": 768}, "768 wide, its text encoder returns 32"),
    ],
)
def test_unsupported_folders_are_refused(copied: Path, file: str, changes: dict[str, Any], complaint: str) -> None:
    edit(copied / file, **changes)
    with pytest.raises(CheckpointError, match=complaint):
        find_checkpoint(str(copied))
