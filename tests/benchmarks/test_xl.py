"""A checkpoint that is written tensor by tensor is one that the build and diffusers read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from benchmarks.xl import checkpoint
from benchmarks.xl.pictures import psnrs
from engines.checkpoints.find import find_checkpoint
from tests.support.checkpoints import load


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The architecture with few channels and layers."""
    unet = {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": (1, 1, 2), "attention_head_dim": 8}
    sizes = {"cross_attention_dim": 48, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
    monkeypatch.setattr(checkpoint, "_UNET", {**checkpoint._UNET, **unet, **sizes})
    monkeypatch.setattr(checkpoint, "_VAE", {**checkpoint._VAE, "block_out_channels": (32,) * 4})
    text = {"intermediate_size": 32, "num_attention_heads": 2, "projection_dim": 16}
    for name, width, layers in (("_TEXT", 16, 2), ("_TEXT_2", 32, 3)):
        changes = {**text, "hidden_size": width, "num_hidden_layers": layers}
        monkeypatch.setattr(checkpoint, name, {**getattr(checkpoint, name), **changes})


@pytest.mark.usefixtures("small")
def test_a_checkpoint_written_tensor_by_tensor_is_complete(tmp_path: Path) -> None:
    checkpoint.write_xl_checkpoint(tmp_path / "xl")
    modules = load(find_checkpoint(str(tmp_path / "xl")))
    stored = load_file(tmp_path / "xl" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    held = modules.unet.state_dict()
    assert held.keys() == stored.keys()
    assert all(torch.equal(held[name], tensor.float()) for name, tensor in stored.items())
    assert modules.text_encoder_2.config.projection_dim == 16
    with torch.inference_mode():  # norms of ones and weights as wide as new layers' keep values in range
        ids = torch.zeros(1, 77, dtype=torch.long)
        assert modules.text_encoder_2(ids).text_embeds.abs().max() < 100


def test_its_full_size_is_that_of_the_published_model() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**checkpoint._UNET)
    assert sum(weight.numel() for weight in unet.parameters()) == 2_567_463_684


def test_pictures_are_compared_one_by_one(tmp_path: Path) -> None:
    for number, colour in enumerate((100, 110)):
        for system, value in (("openvino", colour), ("diffusers", 101)):
            Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(tmp_path / f"{system}-{number}.png")
    assert psnrs(tmp_path, "openvino", 2) == (48.1, 29.0)
