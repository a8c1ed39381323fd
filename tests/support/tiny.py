"""Tiny checkpoints with random weights: diffusers folders of every supported family, written in a second."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from engines.demo.tokenizer import write_tokenizer

TOKENS, WIDTH = 16, 32
SIDE = 32  # pixels; latents have half as many
CAPTIONS = ["a red cat on a blue hill", "a green bird in the rain", "two old boats at night"]


@dataclass(frozen=True)
class Family:
    """Differences of a family of checkpoints from the smallest SD 1.x."""

    unet: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Any = PNDMScheduler
    schedule: Mapping[str, Any] = field(default_factory=dict)
    pipeline: str | None = None
    text_2: Mapping[str, Any] | None = None  # of the second text encoder of Stable Diffusion XL
    tiny_vae: bool = False  # a distilled one
    inpaints: bool = False  # whether the UNet takes a mask and the masked image too; nothing else differs then


_XL_UNET: Mapping[str, Any] = {
    "layers_per_block": 2,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2],
    "cross_attention_dim": WIDTH + 48,
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
# Of variants whose tests are about what surrounds the UNet: half the nodes, so that torch traces them in half the time.
_SHALLOW_XL_UNET: Mapping[str, Any] = {**_XL_UNET, "layers_per_block": 1, "transformer_layers_per_block": 1}
_XL_TEXT_2: Mapping[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "hidden_act": "gelu",
    "projection_dim": 24,
}
_THREE_LEVELS: Mapping[str, Any] = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}

# Each family differs from `sd1` in its scheduler and in the configs of the UNet and the text encoder.
FAMILIES: dict[str, Family] = {
    "sd1": Family(),  # layers_per_block=1, as in the smallest distilled checkpoints
    "sd15": Family(unet={"layers_per_block": 2}),
    "no-mid": Family(unet={"mid_block_type": None}),
    "sd2": Family(
        unet={
            "cross_attention_dim": 64,
            "attention_head_dim": [2, 4],  # heads, despite the name; each 8 wide
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        text={"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "hidden_act": "gelu"},
        scheduler=DDIMScheduler,
        schedule={"prediction_type": "v_prediction", "clip_sample": False},
    ),
    # Eight heads of 40 channels, as in real checkpoints: TensorRT does not fuse the narrower ones of the others.
    "wide": Family(unet={"block_out_channels": (320, 320), "norm_num_groups": 32, "attention_head_dim": 8}),
    "lcm": Family(  # of a distilled model without a middle block
        unet={"time_cond_proj_dim": 32, "mid_block_type": None},
        scheduler=LCMScheduler,
        pipeline="LatentConsistencyModelPipeline",
    ),
    "xl": Family(  # with transformers of several depths, and encoders of different widths and depths
        unet=_XL_UNET,
        text={"num_hidden_layers": 3},
        text_2=_XL_TEXT_2,
        scheduler=EulerDiscreteScheduler,
        schedule={"timestep_spacing": "leading"},
    ),
    "lcm-xl": Family(
        unet={**_SHALLOW_XL_UNET, "time_cond_proj_dim": 32},
        text={"num_hidden_layers": 3},
        text_2=_XL_TEXT_2,
        scheduler=LCMScheduler,
    ),
    # Shapes of distilled models, each smaller than the original in its own way.
    "ssd-1b": Family(  # Segmind Vega has it too: a depth for each layer, and a middle without attention
        unet={
            **_XL_UNET,
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [[1], [2, 1]],
            "reverse_transformer_layers_per_block": [[1, 1, 2], 1],
        },
        text_2=_XL_TEXT_2,
        scheduler=EulerDiscreteScheduler,
    ),
    "koala": Family(  # KOALA-700M; its last block has two layers, without attention
        unet={**_XL_UNET, "mid_block_type": None, "layers_per_block": 1},
        text_2=_XL_TEXT_2,
        scheduler=EulerDiscreteScheduler,
    ),
    "bk-tiny": Family(unet={**_THREE_LEVELS, "mid_block_type": None}),  # BK-SDM-Tiny
    "sdxs": Family(  # SDXS-512-0.9: its first level has no self-attention, and its VAE is distilled
        unet={
            **_THREE_LEVELS,
            "mid_block_type": None,
            "only_cross_attention": [True, False, False],
            "use_linear_projection": True,
        },
        tiny_vae=True,
    ),
}
FAMILIES |= {
    "inpaint": replace(FAMILIES["sd1"], inpaints=True, pipeline="StableDiffusionInpaintPipeline"),
    "xl-inpaint": replace(
        FAMILIES["xl"], unet=_SHALLOW_XL_UNET, inpaints=True, pipeline="StableDiffusionXLInpaintPipeline"
    ),
}


def make_checkpoint(folder: Path, family: str = "sd1") -> Path:
    """Write a checkpoint of `family` with random weights to `folder`, as diffusers does."""
    kind = FAMILIES[family]
    write_tokenizer(folder / "tokenizer", CAPTIONS)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=TOKENS)
    torch.manual_seed(0)
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": _text_encoder(tokenizer, kind.text),
        "unet": _unet(kind.unet),
        "vae": _tiny_vae() if kind.tiny_vae else _vae(),
        "scheduler": _scheduler(kind),
        "feature_extractor": None,
    }
    if kind.text_2 is None:
        pipeline = StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    else:
        pipeline = StableDiffusionXLPipeline(**parts, **_second(folder, kind.text_2), add_watermarker=False)
    if kind.inpaints:
        _widen(pipeline.unet)
    pipeline.save_pretrained(folder)
    if kind.pipeline:
        edit_index(folder, _class_name=kind.pipeline)
    return folder


def _widen(unet: UNet2DConditionModel) -> None:
    """Let a UNet take a mask and a masked image too, as training for inpainting begins; they matter."""
    narrow = unet.conv_in
    unet.register_to_config(in_channels=2 * narrow.in_channels + 1)
    unet.conv_in = torch.nn.Conv2d(unet.config.in_channels, narrow.out_channels, 3, padding=1)
    with torch.no_grad():
        unet.conv_in.weight[:, : narrow.in_channels] = narrow.weight
        unet.conv_in.weight[:, narrow.in_channels :] *= 8  # latents of an untrained VAE are small


def _second(folder: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The second tokenizer, which pads with another token, and the second text encoder."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=TOKENS, pad_token="!")  # noqa: S106 - no password
    return {"tokenizer_2": tokenizer, "text_encoder_2": _text_encoder(tokenizer, changes, CLIPTextModelWithProjection)}


def edit_index(folder: Path, **changes: Any) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes, indent=2))


def make_decoder(folder: Path, **changes: Any) -> Path:
    """Write an `AutoencoderTiny` that decodes the latents of these checkpoints to `folder`."""
    torch.manual_seed(1)
    _tiny_vae(**changes).save_pretrained(folder)
    return folder


def _tiny_vae(**changes: Any) -> AutoencoderTiny:
    config = {
        "encoder_block_out_channels": (16, 16),
        "decoder_block_out_channels": (16, 16),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
        "scaling_factor": 1.5,  # real ones have 1, which would not show that it is used
    }
    return AutoencoderTiny(**{**config, **changes})


def _scheduler(kind: Family) -> Any:
    own = {} if kind.scheduler is EulerDiscreteScheduler else {"set_alpha_to_one": False}
    if kind.scheduler is PNDMScheduler:
        own["skip_prk_steps"] = True
    return kind.scheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        **own,
        **kind.schedule,
    )


def _text_encoder(tokenizer: CLIPTokenizer, changes: Mapping[str, Any], kind: Any = CLIPTextModel) -> Any:
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    encoder = kind(CLIPTextConfig(**{**config, **changes}))
    text_model = getattr(encoder, "text_model", encoder)
    torch.nn.init.normal_(text_model.final_layer_norm.bias, std=0.5)  # zero in new encoders, unlike in trained ones
    return encoder


def _unet(changes: Mapping[str, Any]) -> UNet2DConditionModel:
    config = {
        "sample_size": SIDE // 2,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
    }
    unet = UNet2DConditionModel(**{**config, **changes})
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if name.endswith("attn2.to_out.0.weight"):
                weight.mul_(10)  # otherwise prompts would hardly change the image
    return unet


def _vae() -> AutoencoderKL:
    torch.manual_seed(0)  # the same in every family, so that tests share its graphs
    return AutoencoderKL(
        sample_size=SIDE,
        block_out_channels=(16, 16),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
