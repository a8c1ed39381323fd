"""LoRA files: how they are given on the command line, and which of them can be fused. Reads no weights."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from engines.checkpoints.adapters.embedding import TRAINED_WITH, Embedding
from engines.checkpoints.adapters.lora_scaling import adapter_config_file
from engines.checkpoints.diffusers_folder import CheckpointConfig
from engines.checkpoints.errors import CheckpointError
from engines.checkpoints.safetensors_header import TensorShapes, read_header

# Tensor names by which files that cannot be fused are recognised.
_UNSUPPORTED = {
    r"^lora_te2_|^text_encoder_2\.|^lora_unet_(input|output)_blocks_": "a LoRA for Stable Diffusion XL",
    r"^lora_te3_|^(transformer|text_encoder_3)\.|^lora_unet_(double|single|joint)_blocks_": (
        "a LoRA for a diffusion transformer (Stable Diffusion 3, Flux)"
    ),
    r"\.hada_": "a LoHa, not a LoRA (merge it into a checkpoint with the tool that it was trained with)",
    r"\.lokr_": "a LoKr, not a LoRA (merge it into a checkpoint with the tool that it was trained with)",
    r"dora_scale|lora_magnitude_vector": "a DoRA, which also rescales the weights",
    r"\.diff(_b)?$": "a full difference of weights, not a LoRA",
    r"^bundle_emb\.": "a LoRA with embeddings bundled into it, which must be files of their own (--embedding)",
}
_SUPPORTED = "Supported: LoRAs for Stable Diffusion 1.x and 2.x"
_PROMPT_FACTOR = re.compile(r"attn2[._](?:processor\.)?to_[kv](?:_lora)?\.(?:.*\.)?(?:lora_down|lora_A|down)\b")
_OLD_PROMPT_FACTORS = ("unet:6:down", "unet:7:down")  # attn2's to_k and to_v in the first transformer block
_MODELS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
_FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # of PEFT, of diffusers
_FORMS = "write FILE.safetensors or FILE.safetensors:SCALE"


@dataclass(frozen=True)
class Lora:
    """A low-rank update of the weights, and the scale at which it is fused."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read FILE or FILE:SCALE, such as `style.safetensors:0.8`, or the same of a folder. Raises CheckpointError."""
        path, scale = _split(text)
        return cls(path, _number(scale, path) if scale is not None else 1.0)

    def __str__(self) -> str:
        return f"{self.path.name}:{self.scale:g}"

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that decides the update."""
        config = adapter_config_file(self.path)
        return (self.path, config) if config else (self.path,)


def _split(text: str) -> tuple[Path, str | None]:
    """The file, and the scale as it is written."""
    if Path(text).is_dir():
        return _file_in(Path(text)), None
    before, colon, scale = text.rpartition(":")
    if colon and Path(before).is_dir():
        return _file_in(Path(before)), scale
    if found := re.fullmatch(r"(.+?\.safetensors)(?::(.*))?", text, re.IGNORECASE | re.DOTALL):
        return Path(found[1]), found[2]
    raise CheckpointError(f"{text!r} is not a LoRA file: {_hint(text)}.")


def _hint(text: str) -> str:
    if re.search(r"\.(bin|pt|pth|ckpt)(:|$)", text, re.IGNORECASE):
        return (
            "it is a pickle, and loading one can run code. Convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), FILE.safetensors), and "
            f"{_FORMS}"
        )
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\d.]*)?", text):
        return f"there is no such folder. Download it if it is a hub id, and {_FORMS}"
    return _FORMS


def _file_in(folder: Path) -> Path:
    """The file that PEFT or diffusers has written to a folder, or the only one there."""
    for name in _FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        held = f"holds {len(found)} .safetensors files" if found else f"holds no {' or '.join(_FOLDER_FILES)}"
        parts = [part for part in ("unet", "text_encoder") if (folder / part / _FOLDER_FILES[0]).is_file()]
        remedy = " and ".join(f"--lora {folder / part}" for part in parts) or f"{_FORMS} of one"
        raise CheckpointError(f"{folder} {held}: {f'pass {remedy}' if parts else remedy}.")
    return found[0]


def _number(text: str, path: Path) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise CheckpointError(f"{text!r} is not a LoRA scale: write a number, such as {path}:0.8.")
    return number


def check_lora(path: Path) -> None:
    """Raise CheckpointError unless the tensor names are those of a LoRA. Shapes are checked when it is fused."""
    shapes, metadata = read_header(path)
    for sign, kind in _UNSUPPORTED.items():
        if any(re.search(sign, key) for key in shapes):
            raise CheckpointError(f"{path.name} is {kind}. {_SUPPORTED}.")
    if not any("lora" in key for key in shapes) and not _in_early_form(shapes):
        if TRAINED_WITH in metadata.values():
            raise CheckpointError(f"{path.name} holds learned tokens and no LoRA: pass it with --embedding.")
        raise CheckpointError(f"{path.name} is not a LoRA: none of its tensors is named like one.")


def check_lora_fits(lora: Lora, config: CheckpointConfig) -> None:
    """Raise CheckpointError for a LoRA of a model with another text encoder, as far as its header shows."""
    shapes, _ = read_header(lora.path)
    width = _prompt_width(shapes)
    if width and width != config.context.width:
        made = f"{_MODELS[width]}, with" if width in _MODELS else "a model with"
        raise CheckpointError(
            f"{lora.path.name} is a LoRA for {made} prompt embeddings {width} wide, and those of {config.name} are "
            f"{config.context.width} wide: pass one that was trained on the same kind of model."
        )


def embeddings_in(loras: Sequence[Lora]) -> tuple[Embedding, ...]:
    """The tokens that were trained together with some of `loras`, and lie in the same file."""
    return tuple(Embedding(lora.path) for lora in loras if TRAINED_WITH in read_header(lora.path)[1].values())


def _prompt_width(shapes: TensorShapes) -> int | None:
    """Width of the prompt embeddings that the LoRA updates the projections of; None where it updates none."""
    keys = (key for key in shapes if _PROMPT_FACTOR.search(key) or key in _OLD_PROMPT_FACTORS)
    return next((shapes[key][-1] for key in keys if len(shapes[key]) == 2), None)


def _in_early_form(shapes: TensorShapes) -> bool:
    return any(re.fullmatch(r"(unet|text_encoder):\d+:(up|down)", key) for key in shapes)
