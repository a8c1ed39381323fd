"""Families of models: the pipelines of each in diffusers, and the parts that they have. Nothing else asks for a family.

What a family's UNet and encoders need of each other is in `engines.checkpoints.supported`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from engines.errors import CheckpointError

SECOND_ENCODER, SECOND_TOKENIZER = "text_encoder_2", "tokenizer_2"
SUPPORTED = "Supported models: text-to-image and inpainting checkpoints of Stable Diffusion 1.x, 2.x and XL"
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_ONE_ENCODER: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("CLIPTextModel",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
}


@dataclass(frozen=True)
class Family:
    """Checkpoints that are read alike.

    Attributes:
        pipelines: the classes that `model_index.json` may name.
        parts: the parts that have weights, each with the classes that are read; without one of them there is no model.
        tokenizers: the tokenizers, in the order of their text encoders.
        follows_force_upcast: whether its pipelines in diffusers heed the VAE's `force_upcast`: it leaves FP16's range.
        time_ids: how many numbers the UNet takes besides the timestep; 0 where it takes no pooled embedding either.
    """

    pipelines: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]
    tokenizers: tuple[str, ...] = ("tokenizer",)
    time_ids: int = 0
    follows_force_upcast: bool = False

    @property
    def classes(self) -> Mapping[str, tuple[str, ...]]:
        """The classes of every part that the index names, tokenizers among them."""
        return {**self.parts, **dict.fromkeys(self.tokenizers, _TOKENIZERS)}


STABLE_DIFFUSION = Family(  # 1.x and 2.x
    pipelines=(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
    ),
    parts=_ONE_ENCODER,
)
STABLE_DIFFUSION_XL = Family(  # Podell et al. (2023)
    pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    parts={**_ONE_ENCODER, SECOND_ENCODER: ("CLIPTextModelWithProjection",)},
    tokenizers=("tokenizer", SECOND_TOKENIZER),
    time_ids=6,
    follows_force_upcast=True,
)
# Pipelines whose UNets may take a mask and the latents of the masked image, after the latents.
INPAINTING = ("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline")
FAMILIES = (STABLE_DIFFUSION, STABLE_DIFFUSION_XL)
EVERY_PART = tuple(dict.fromkeys(part for family in FAMILIES for part in family.parts))
EVERY_TOKENIZER = tuple(dict.fromkeys(name for family in FAMILIES for name in family.tokenizers))

# Pipelines that are not supported, by their class: why, and what to do. The first that matches holds.
_REFUSED = {
    r"ControlNet|Adapter|GLIGEN|ReferenceOnly": (
        "which draws by a control image: build from the checkpoint that it extends"
    ),
    r"Upscale|Depth2Img|Pix2Pix|ImageVariation|UnCLIP|LatentUpscale|Marigold": (
        "which needs an image in addition to the prompt: build from a text-to-image checkpoint"
    ),
    r"AnimateDiff|Video|SVD|Motion": "which makes videos: build from a text-to-image checkpoint",
    r"Kandinsky|Cascade|Wuerstchen|^IF|DeepFloyd|aMused|Amused|Kolors": (
        "whose UNet takes other inputs than Stable Diffusion's: build from a checkpoint of Stable Diffusion"
    ),
    r"StableDiffusion3|Flux|PixArt|Sana|Hunyuan|AuraFlow|Lumina|Chroma|QwenImage|CogView|Allegro|ZImage|DiT|Bria": (
        "a diffusion transformer, which has no UNet: build from a checkpoint of Stable Diffusion"
    ),
}


def family_of(pipeline: str, name: str) -> Family:
    """The family of `pipeline`, the class in the index of checkpoint `name`. Raises CheckpointError without one."""
    for family in FAMILIES:
        if pipeline in family.pipelines:
            return family
    reason = next((text for sign, text in _REFUSED.items() if re.search(sign, pipeline)), "which is not supported")
    known = " and ".join(family.pipelines[0] for family in FAMILIES)
    raise CheckpointError(f"{name} is a {pipeline} (_class_name in model_index.json), {reason}. {SUPPORTED} ({known}).")
