"""Which files are no LoRAs of these models, by the names and shapes of their tensors."""

from __future__ import annotations

import re

from engines.errors import CheckpointError
from engines.lora.file import LoraHeader
from engines.safetensors_header import TensorShapes

# Tensor names by which files that cannot be used are recognised.
_UNSUPPORTED = {
    r"^lora_te3_|^(transformer|text_encoder_3)\.|^lora_unet_(double|single|joint)_blocks_": (
        "a LoRA for a diffusion transformer (Stable Diffusion 3, Flux)"
    ),
    r"\.hada_": "a LoHa, not a LoRA (merge it into a checkpoint with the tool that it was trained with)",
    r"\.lokr_": "a LoKr, not a LoRA (merge it into a checkpoint with the tool that it was trained with)",
    r"dora_scale|lora_magnitude_vector": "a DoRA, which also rescales the weights",
    r"\.diff(_b)?$": "a full difference of weights, not a LoRA",
    r"^bundle_emb\.": "a LoRA with embeddings bundled into it, which must be files of their own (--embedding)",
}
_SUPPORTED = "Supported: LoRAs for Stable Diffusion 1.x, 2.x and XL"
_SECOND_ENCODER = re.compile(r"(base_model\.model\.)?(lora_te2_|text_encoder_2\.)")
_PROMPT_FACTOR = re.compile(r"attn2[._](?:processor\.)?to_[kv](?:_lora)?\.(?:.*\.)?(?:lora_down|lora_A|down)\b")
_OLD_PROMPT_FACTORS = ("unet:6:down", "unet:7:down")  # attn2's to_k and to_v in the first transformer block
_EARLY = re.compile(r"(unet|text_encoder):\d+:(up|down)")
_MODELS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}


def check_is_lora(header: LoraHeader) -> None:
    """Raise CheckpointError unless the tensor names are those of a LoRA."""
    for sign, kind in _UNSUPPORTED.items():
        if any(re.search(sign, key) for key in header.shapes):
            raise CheckpointError(f"{header.name} is {kind}. {_SUPPORTED}.")
    if not any("lora" in key or _EARLY.fullmatch(key) for key in header.shapes):
        if header.learned:
            raise CheckpointError(f"{header.name} holds learned tokens and no LoRA: pass it with --embedding.")
        raise CheckpointError(f"{header.name} is not a LoRA: none of its tensors is named like one.")


def check_kind(header: LoraHeader, *, model: str, width: int, has_two_encoders: bool) -> None:
    """Raise CheckpointError for a LoRA of another kind of model, as far as it shows.

    Args:
        header: the file's.
        model: its name.
        width: of its prompt embeddings.
        has_two_encoders: whether it has a second text encoder.
    """
    if not has_two_encoders and any(map(_SECOND_ENCODER.match, header.shapes)):
        raise CheckpointError(
            f"{header.name} is a LoRA for Stable Diffusion XL, with updates of a second text encoder, and {model} has "
            "one: pass one that was trained on the same kind of model."
        )
    found = _prompt_width(header.shapes)
    if found and found != width:
        made = f"{_MODELS[found]}, with" if found in _MODELS else "a model with"
        raise CheckpointError(
            f"{header.name} is a LoRA for {made} prompt embeddings {found} wide, and those of {model} are "
            f"{width} wide: pass one that was trained on the same kind of model."
        )


def _prompt_width(shapes: TensorShapes) -> int | None:
    """Width of the prompt embeddings that the LoRA updates the projections of; None where it updates none."""
    keys = (key for key in shapes if _PROMPT_FACTOR.search(key) or key in _OLD_PROMPT_FACTORS)
    return next((shapes[key][-1] for key in keys if len(shapes[key]) == 2), None)
