"""Layers have the names by which diffusers finds them in files of kohya's tools."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils
from torch import nn

from engines.lora.sgm import sgm_names

_ATTENTION, _PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def unet(down: str, *, layers: int, depths: list[int], middle: str | None = "UNetMidBlock2DCrossAttn") -> list[str]:
    """The layers of a UNet whose blocks have attention where `down` has an A."""
    kinds = [_ATTENTION if kind == "A" else _PLAIN for kind in down]
    with torch.device("meta"):
        made = UNet2DConditionModel(
            block_out_channels=tuple(32 * (1 + number) for number in range(len(down))),
            down_block_types=tuple(kind.format("Down") for kind in kinds),
            up_block_types=tuple(kind.format("Up") for kind in reversed(kinds)),
            mid_block_type=middle,
            layers_per_block=layers,
            transformer_layers_per_block=depths,
            cross_attention_dim=8,
            attention_head_dim=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=56,
        )
    return [name for name, layer in made.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def by_diffusers(name: str, layers: int) -> str:
    """Which layer diffusers takes a name in kohya's form for."""
    key = f"lora_unet_{name.replace('.', '_')}"
    tensors = {f"{key}.lora_down.weight": torch.zeros(1), f"{key}.lora_up.weight": torch.zeros(1)}
    mapped = lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers(tensors, SimpleNamespace(layers_per_block=layers))
    found, _ = lora_conversion_utils._convert_non_diffusers_lora_to_diffusers(mapped)
    down: str
    (down,) = (key for key in found if key.endswith("down.weight"))
    return (
        down.removeprefix("unet.").replace(".processor.", ".").replace("_lora.down.", ".lora.down.").split(".lora.")[0]
    )


@pytest.mark.parametrize(
    ("down", "layers", "depths"),
    [("PAA", 2, [1, 2, 10]), ("AAAP", 2, [1, 1, 1, 1]), ("PA", 1, [1, 3]), ("AP", 3, [1, 1])],
    ids=["SDXL", "SD 1.x", "one layer", "three layers"],
)
def test_names_are_those_that_diffusers_finds(down: str, layers: int, depths: list[int]) -> None:
    """But for upsamplers without attention, which SDXL does not have: diffusers takes them for attention."""
    known = unet(down, layers=layers, depths=depths)
    names = sgm_names(known)
    assert names.keys() == set(known)
    assert len(set(names.values())) == len(known)
    for layer, name in names.items():
        if not name.endswith(".1.conv"):
            assert by_diffusers(name, layers) in (layer, layer.removesuffix(".0"))


def test_published_names() -> None:
    """Some of sd_xl_base_1.0."""
    names = sgm_names(unet("PAA", layers=2, depths=[1, 2, 10]))
    assert names["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert names["down_blocks.1.resnets.0.conv_shortcut"] == "input_blocks.4.0.skip_connection"
    assert names["mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj"] == (
        "middle_block.1.transformer_blocks.9.ff.net.0.proj"
    )
    assert names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    assert names["up_blocks.2.resnets.2.conv2"] == "output_blocks.8.0.out_layers.3"
    assert names["add_embedding.linear_2"] == "label_emb.0.2"
    without = sgm_names(unet("PA", layers=2, depths=[1, 1], middle=None))
    assert not any(name.startswith("middle_block") for name in without.values())
