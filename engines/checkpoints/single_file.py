"""Single-file checkpoints, with the names of Stable Diffusion's first release: recognised by their tensors' shapes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engines.checkpoints import single_file_xl
from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.families import SUPPORTED
from engines.checkpoints.supported import check_channels
from engines.errors import CheckpointError
from engines.safetensors_header import TensorShapes, read_header

Version = Literal["1", "2", "XL"]
_UNET, _VAE, _TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
_UNWRAPPED = re.compile(
    r"^(cond_stage_model\.transformer\.|conditioner\.embedders\.0\.transformer\.)"
    r"(embeddings|encoder|final_layer_norm)\."
)
SD1_CONFIGS = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # its configs describe every single file of SD 1.x
# Tensor names by which models that are complete, and of another kind, are recognised.
_OTHER_MODELS = {
    r"model\.diffusion_model\.joint_blocks\.": "a Stable Diffusion 3 checkpoint",
    r"model\.diffusion_model\.double_blocks\.": "a Flux checkpoint",
    r"model\.diffusion_model\.(transformer_blocks|blocks|layers)\.0\.": "a diffusion transformer",
    r"model\.diffusion_model\.time_embed\.cond_proj\.": (
        "a latent consistency model in one file (pass it as a diffusers folder)"
    ),
    r"scaled_fp8$|.*\.(scale_weight|absmax|quant_map|qweight)$": (
        "quantized, with weights that are to be scaled when it runs (pass it in FP16, BF16, FP32 or plain FP8)"
    ),
}
# Tensor names by which other files are recognised, the most certain first.
_OTHER_KINDS = {
    r".*[._](lora_down|lora_up|lora_A|lora_B|lora|hada_w1_a|lokr_w1)\b|(unet|text_encoder):0:(up|down)$": (
        "a LoRA, an update of another checkpoint's weights (pass it with --lora)"
    ),
    r"(control_model|controlnet_cond_embedding|input_hint_block)\.": "a ControlNet",
    r"clip_txt_mapper\.|(model\.diffusion_model\.)?down_blocks\.\d+\.\d+\.channelwise\.": "a Stable Cascade checkpoint",
    r"joint_blocks\.": "a Stable Diffusion 3 checkpoint",
    r"double_blocks\.": "a Flux checkpoint",
    r"(transformer_blocks|blocks)\.0\.|layers\.0\.": "a diffusion transformer",
    r"(decoder\.layers\.\d+|\d+)\.(conv\.0\.)?weight$": (
        "a distilled decoder, such as TAESD (pass it with --decoder, beside the --model whose images it decodes)"
    ),
    r"(down_blocks|mid_block|text_model|embeddings|encoder\.down_blocks|decoder\.up_blocks)\.": (
        "one part of a diffusers checkpoint (pass the folder that holds all of them)"
    ),
    r"(encoder|decoder)\.(conv_in|mid)\.": "a VAE alone (pass it with --vae, beside the --model that it is for)",
    r"(input_blocks|middle_block|output_blocks)\.": "a UNet alone (pass a file that holds VAE and text encoder too)",
}
_UNET_LAYERS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "out.")
# What training leaves in complete files, and no image needs.
_LEFT_BY_TRAINING = re.compile(
    r"model_ema\.|loss\.|(sqrt_|log_)?(one_minus_)?(recip(m1)?_)?alphas_cumprod|betas$|log_one_minus|sqrt_|posterior_|"
    r"lvlb_weights$|logvar$|scale_factor$|v_pred$|ztsnr$|denoiser\.sigmas$|"
    r"(cond_stage|first_stage)_model\.|conditioner\."
)


@dataclass(frozen=True)
class _Names:
    """What tensors are called in the single files of a family."""

    text: Mapping[str, str]  # a text encoder by the prefix of its tensors
    unet_layers: tuple[str, ...]
    other_models: Mapping[str, str]  # models with these names that are of another kind, by a tensor of theirs

    @property
    def parts(self) -> Mapping[str, str]:
        """What is in a complete file, by the prefix of its tensors."""
        return {_UNET: "UNet", _VAE: "VAE", **self.text}

    def is_stray(self, key: str) -> bool:
        if key.startswith(_UNET):
            return not key.removeprefix(_UNET).startswith(self.unet_layers)
        return not _LEFT_BY_TRAINING.match(key)


_FIRST = _Names(
    text={_TEXT: "text encoder"},
    unet_layers=_UNET_LAYERS,
    other_models={
        r"model\.diffusion_model\.label_emb\.": (
            "a checkpoint whose UNet needs a class or an image in addition to the prompt"
        )
    },
)
_XL = _Names(
    text=single_file_xl.TEXT_ENCODERS,
    unet_layers=(*_UNET_LAYERS, *single_file_xl.UNET_LAYERS),
    other_models=single_file_xl.OTHER_MODELS,
)


@dataclass(frozen=True)
class SingleFileLayout:
    """What a single file holds."""

    version: Version  # of Stable Diffusion, by the text encoders
    channels: int  # of the UNet's input
    width: int  # of prompt embeddings
    tensors: int  # of the UNet
    has_vae: bool = True
    strays: tuple[str, ...] = ()  # names of tensors that belong to none of the parts

    @property
    def default_configs(self) -> str | None:
        """The hub id of the checkpoint whose configs describe the file; None where it does not say enough."""
        return {"1": SD1_CONFIGS, "2": None, "XL": single_file_xl.CONFIGS}[self.version]


def read_layout(path: Path, *, needs_vae: bool = True) -> SingleFileLayout:
    """Recognise a .safetensors file by its header. Raises CheckpointError if it is not supported."""
    return layout_of(path.name, read_header(path)[0], needs_vae=needs_vae)


def layout_of(name: str, shapes: TensorShapes, *, needs_vae: bool = True) -> SingleFileLayout:
    """Recognise a single file by its tensors. Raises CheckpointError if it is not supported.

    Beside a complete model other tensors are no error; what is not complete is named by what else it is.
    """
    names = _names_in(shapes)
    missing = [part for prefix, part in names.parts.items() if not any(key.startswith(prefix) for key in shapes)]
    for sign, kind in {**_OTHER_MODELS, **names.other_models, **(_OTHER_KINDS if missing else {})}.items():
        if any(re.match(sign, key) for key in shapes):
            raise CheckpointError(f"{name} is {kind}. {SUPPORTED}.")
    has_vae = "VAE" not in missing
    missing = [part for part in missing if needs_vae or part != "VAE"]
    unet = {key.removeprefix(_UNET): shape for key, shape in shapes.items() if key.startswith(_UNET)}
    layers = {key: shape for key, shape in unet.items() if key.startswith(names.unet_layers)}
    widths = [shape[-1] for key, shape in layers.items() if key.endswith(".attn2.to_k.weight") and shape]
    first = layers.get("input_blocks.0.0.weight")
    if not any(key.startswith(tuple(names.parts)) for key in shapes) or (not missing and not (widths and first)):
        raise CheckpointError(f"{name} is not a checkpoint of a known layout. {SUPPORTED}.")
    if missing:
        remedy = "pass one with --vae" if missing == ["VAE"] else "pass a file that holds all parts"
        raise CheckpointError(f"{name} holds no {' and no '.join(missing)}: {remedy}.")
    return SingleFileLayout(
        version=_version(names, shapes),
        channels=first[1] if first and len(first) > 1 else 0,
        width=widths[0],
        tensors=len(layers),
        has_vae=has_vae,
        strays=tuple(key for key in shapes if names.is_stray(key)),
    )


def _names_in(keys: Collection[str]) -> _Names:
    return _XL if single_file_xl.is_xl(keys) else _FIRST


def _version(names: _Names, keys: Collection[str]) -> Version:
    if names is _XL:
        return "XL"
    return "2" if any(key.startswith(f"{_TEXT}model.") for key in keys) else "1"


def model_names(keys: Collection[str]) -> dict[str, str]:
    """The names of the model's tensors in a single file, and those that diffusers knows them by.

    Some text encoders, such as NovelAI's, lack the wrapper `text_model`.
    """
    names = _names_in(keys)
    return {
        key: _UNWRAPPED.sub(r"\1text_model.\2.", key)
        for key in keys
        if key.startswith(tuple(names.parts)) and not names.is_stray(key)
    }


def check_configs_fit(checkpoint: Checkpoint, layout: SingleFileLayout) -> None:
    """Raise CheckpointError unless the configs describe the single file, as far as its layout shows."""
    name, config = checkpoint.path.name, checkpoint.config
    check_channels(name, layout.channels, config.vae.latent_channels, inpaints=True)
    if layout.width != config.context.width:
        raise CheckpointError(
            f"{name} takes prompt embeddings {layout.width} wide (Stable Diffusion {layout.version}), but the configs "
            f"in {config.folder} describe a model that takes {config.context.width}: pass --config with a checkpoint "
            "of the same kind."
        )
