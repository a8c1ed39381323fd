"""Single-file checkpoints, in the layout of Stable Diffusion's first release: recognised by their tensors' shapes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.errors import CheckpointError
from engines.checkpoints.safetensors_header import TensorShapes, read_header
from engines.checkpoints.supported import SUPPORTED, check_channels

_UNET = "model.diffusion_model."
_PREFIXES = {_UNET: "UNet", "first_stage_model.": "VAE", "cond_stage_model.": "text encoder"}
# Tensor names by which other files are recognised, the most certain first.
_OTHER_KINDS = {
    r".*[._](lora_down|lora_up|lora_A|lora_B|lora|hada_w1_a|lokr_w1)\b": (
        "a LoRA, an update of another checkpoint's weights (pass it with --lora)"
    ),
    r"(control_model|controlnet_cond_embedding|input_hint_block)\.": "a ControlNet",
    r"conditioner\.embedders\.1\.": "a Stable Diffusion XL checkpoint",
    r"conditioner\.embedders\.0\.": "a Stable Diffusion XL refiner",
    r"(model\.diffusion_model\.)?joint_blocks\.": "a Stable Diffusion 3 checkpoint",
    r"(model\.diffusion_model\.)?double_blocks\.": "a Flux checkpoint",
    r"(model\.diffusion_model\.)?(transformer_blocks|blocks|layers)\.0\.": "a diffusion transformer",
    r"model\.diffusion_model\.label_emb\.": (
        "a checkpoint whose UNet needs a class or an image in addition to the prompt"
    ),
    r"model\.diffusion_model\.time_embed\.cond_proj\.": (
        "a latent consistency model in one file (pass it as a diffusers folder)"
    ),
    r"(down_blocks|mid_block|text_model|embeddings|encoder\.down_blocks|decoder\.up_blocks)\.": (
        "one part of a diffusers checkpoint (pass the folder that holds all of them)"
    ),
    r"(encoder|decoder)\.(conv_in|mid)\.": "a VAE alone",
}


@dataclass(frozen=True)
class SingleFileLayout:
    """What a single file holds."""

    version: int  # of Stable Diffusion, 1 or 2, by the text encoder
    channels: int  # of the UNet's input
    width: int  # of prompt embeddings
    tensors: int  # of the UNet


def read_layout(path: Path) -> SingleFileLayout:
    """Recognise a .safetensors file by its header. Raises CheckpointError if it is not supported."""
    return layout_of(path.name, read_header(path)[0])


def layout_of(name: str, shapes: TensorShapes) -> SingleFileLayout:
    """Recognise a single file by its tensors. Raises CheckpointError if it is not supported."""
    for sign, kind in _OTHER_KINDS.items():
        if any(re.match(sign, key) for key in shapes):
            raise CheckpointError(f"{name} is {kind}. {SUPPORTED}.")
    missing = [part for prefix, part in _PREFIXES.items() if not any(key.startswith(prefix) for key in shapes)]
    unet = {key.removeprefix(_UNET): shape for key, shape in shapes.items() if key.startswith(_UNET)}
    widths = [shape[-1] for key, shape in unet.items() if key.endswith(".attn2.to_k.weight")]
    first = unet.get("input_blocks.0.0.weight")
    if len(missing) == len(_PREFIXES) or (not missing and not (widths and first)):
        raise CheckpointError(f"{name} is not a checkpoint of a known layout. {SUPPORTED}.")
    if missing:
        raise CheckpointError(f"{name} holds no {' and no '.join(missing)}: pass a file that holds all three parts.")
    open_clip = any(key.startswith("cond_stage_model.model.") for key in shapes)
    return SingleFileLayout(
        version=2 if open_clip else 1, channels=first[1] if first else 0, width=widths[0], tensors=len(unet)
    )


def check_configs_fit(checkpoint: Checkpoint, layout: SingleFileLayout) -> None:
    """Raise CheckpointError unless the configs describe the single file, as far as its layout shows."""
    name, config = checkpoint.path.name, checkpoint.config
    check_channels(name, layout.channels, config.read("vae")["latent_channels"])
    if layout.width != config.context.width:
        raise CheckpointError(
            f"{name} takes prompt embeddings {layout.width} wide (Stable Diffusion {layout.version}), but the configs "
            f"in {config.folder} describe a model that takes {config.context.width}: pass --config with a checkpoint "
            "of the same kind."
        )
