"""UNets of distilled models as their authors publish them: their configs are read, and are the size that they say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from engines.checkpoints.configs import UnetConfig, parse_config
from engines.errors import CheckpointError

_XL: Mapping[str, Any] = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_THREE_LEVELS: Mapping[str, Any] = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 1,
    "mid_block_type": None,
}
# Each with the weights of its UNet in thousand millions, as papers and model cards have them.
PUBLISHED: Mapping[str, tuple[Mapping[str, Any], float]] = {
    "SDXL": ({**_XL, "transformer_layers_per_block": [1, 2, 10]}, 2.57),
    "SSD-1B": (
        {
            **_XL,
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [[1], [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        },
        1.3,
    ),
    "Segmind-Vega": (
        {
            **_XL,
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [[1], [1, 1], [2, 2]],
            "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
        },
        0.74,
    ),
    "KOALA-700M": (
        {**_XL, "layers_per_block": 1, "mid_block_type": None, "transformer_layers_per_block": [1, 2, 5]},
        0.782,
    ),
    "KOALA-1B": ({**_XL, "layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6]}, 1.161),
    "BK-SDM-Base": ({"sample_size": 64, "layers_per_block": 1, "cross_attention_dim": 768}, 0.58),
    "BK-SDM-Small": (
        {"sample_size": 64, "layers_per_block": 1, "cross_attention_dim": 768, "mid_block_type": None},
        0.49,
    ),
    "BK-SDM-Tiny": ({**_THREE_LEVELS, "cross_attention_dim": 768}, 0.33),
    "SDXS-512-0.9": (
        {
            **_THREE_LEVELS,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "only_cross_attention": [True, False, False],
        },
        0.32,
    ),
    "SDXS-512-DreamShaper": (
        {
            **_THREE_LEVELS,
            "cross_attention_dim": 768,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        },
        0.32,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    config, billions = PUBLISHED[name]
    read = parse_config(UnetConfig, config, Path("unet/config.json"))
    assert read.mid_block_type == config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert sum(weight.numel() for weight in unet.parameters()) / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"reverse_transformer_layers_per_block": None}, "reverse_transformer_layers_per_block is missing"),
        (
            {"transformer_layers_per_block": [[1], [2, 2], [4, 4, 4]]},
            "transformer_layers_per_block should have 2 entries for a level of 2 layers, and has 3",
        ),
        (
            {"reverse_transformer_layers_per_block": [[4, 4], [2, 1, 1], 1]},
            "reverse_transformer_layers_per_block should have 3 entries for a level of 3 layers, and has 2",
        ),
        ({"reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1]]}, "should have 3 entries, one for each of"),
        ({"transformer_layers_per_block": [[1], [2, [2]], [4, 4]]}, "should be a whole number from 0 to 64"),
        ({"only_cross_attention": [True]}, "only_cross_attention should have 3 entries"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type should be 'UNetMidBlock2DCrossAttn' or"),
        ({"down_block_types": ["Other"] * 3}, r"down_block_types\.0 should be 'CrossAttnDownBlock2D' or 'DownBlock2D'"),
        ({"up_block_types": ["AttnUpBlock2D"] * 3}, r"up_block_types\.0 should be 'CrossAttnUpBlock2D' or 'UpBlock2D'"),
    ],
)
def test_shapes_that_no_unet_has(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        parse_config(UnetConfig, {**PUBLISHED["SSD-1B"][0], **changes}, Path("unet/config.json"))
