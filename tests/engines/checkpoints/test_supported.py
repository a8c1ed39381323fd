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
        ("model_index.json", {"vae": ["diffusers", "VQModel"]}, "VQModel as vae"),
        ("model_index.json", {"tokenizer": ["transformers", "T5Tokenizer"]}, "T5Tokenizer as tokenizer"),
        ("unet/config.json", {"in_channels": 9}, r"9 input channels \(inpainting\)"),
        ("unet/config.json", {"in_channels": 5}, r"5 input channels \(depth"),
        ("unet/config.json", {"in_channels": 8}, r"8 input channels \(editing"),
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


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        ("StableDiffusion3Pipeline", "a diffusion transformer, which has no UNet"),
        ("StableDiffusion3ControlNetPipeline", "which draws by a control image"),
        ("FluxPipeline", "a diffusion transformer, which has no UNet"),
        ("PixArtSigmaPipeline", "a diffusion transformer, which has no UNet"),
        ("KandinskyV22Pipeline", "whose UNet takes other inputs"),
        ("StableDiffusionXLControlNetPipeline", "build from the checkpoint that it extends"),
        ("StableDiffusionAdapterPipeline", "build from the checkpoint that it extends"),
        ("StableDiffusionInstructPix2PixPipeline", "needs an image in addition to the prompt"),
        ("AnimateDiffSDXLPipeline", "makes videos"),
        ("PNDMScheduler", "which is not supported"),
    ],
)
def test_other_pipelines_are_refused_with_what_to_do(copied: Path, pipeline: str, reason: str) -> None:
    edit(copied / "model_index.json", _class_name=pipeline)
    with pytest.raises(CheckpointError, match=rf"is a {pipeline} \(_class_name in model_index\.json\), .*{reason}"):
        find_checkpoint(str(copied))


@pytest.mark.parametrize(
    ("file", "changes", "complaint"),
    [
        ("model_index.json", {"text_encoder": [None, None]}, "nothing as text_encoder .* Build from the base model"),
        ("model_index.json", {"text_encoder_2": [None, None]}, "nothing as text_encoder_2"),
        (
            "model_index.json",
            {"text_encoder_2": ["transformers", "CLIPTextModel"]},
            "a CLIPTextModel as text_encoder_2",
        ),
        ("model_index.json", {"tokenizer_2": ["transformers", "T5Tokenizer"]}, "a T5Tokenizer as tokenizer_2"),
        ("unet/config.json", {"addition_embed_type": None}, "without addition_embed_type 'text_time'"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type 'image', an input"),
        ("unet/config.json", {"addition_time_embed_dim": None}, "addition_time_embed_dim is missing"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": None}, "input_dim is missing"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 64}, "is 64, and 6 numbers of 8 .* make 72"),
        ("unet/config.json", {"cross_attention_dim": 48}, "48 wide, its two text encoders return together 80"),
        ("text_encoder_2/config.json", {"max_position_embeddings": 77}, "one takes 16 tokens, the other 77"),
        ("tokenizer_2/vocab.json", {"other": 3}, "another vocabulary than .*tokenizer, such as 'other'"),
    ],
)
def test_parts_of_two_encoders_that_do_not_fit(
    copied_xl: Path, file: str, changes: dict[str, Any], complaint: str
) -> None:
    path = copied_xl / file
    if not path.exists():
        path.write_text("{}")
    edit(path, **changes)
    with pytest.raises(CheckpointError, match=complaint):
        find_checkpoint(str(copied_xl))


def test_an_inpainting_pipeline_takes_a_mask_or_a_latent_alone(copied: Path) -> None:
    edit(copied / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    for channels in (4, 9):
        edit(copied / "unet/config.json", in_channels=channels)
        assert find_checkpoint(str(copied)).config.latent.channels == 4
    edit(copied / "unet/config.json", in_channels=5)
    with pytest.raises(CheckpointError, match=r"5 input channels \(depth"):
        find_checkpoint(str(copied))
