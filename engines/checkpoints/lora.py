"""LoRA files: how they are given on the command line, and which of them can be fused. Reads no weights."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from engines.checkpoints.errors import CheckpointError
from engines.checkpoints.safetensors_header import read_header

# Tensor names by which files that cannot be fused are recognised.
_UNSUPPORTED = {
    r"^lora_te[12]_|^text_encoder_2\.|^lora_unet_(input|output)_blocks_": "a LoRA for Stable Diffusion XL",
    r"^lora_te3_|^(transformer|text_encoder_3)\.|^lora_unet_(double|single|joint)_blocks_": (
        "a LoRA for a diffusion transformer (Stable Diffusion 3, Flux)"
    ),
    r"\.hada_": "a LoHa, not a LoRA",
    r"\.lokr_": "a LoKr, not a LoRA",
    r"dora_scale|lora_magnitude_vector": "a DoRA, which also rescales the weights",
    r"\.lora_mid\.": "a LoRA with three factors",
}


@dataclass(frozen=True)
class Lora:
    """A low-rank update of the weights, and the scale at which it is fused."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read FILE or FILE:SCALE, such as `style.safetensors:0.8`. Raises CheckpointError."""
        if text.lower().endswith(".safetensors"):
            return cls(Path(text))
        path, _, scale = text.rpartition(":")
        if not path.lower().endswith(".safetensors"):
            raise CheckpointError(f"{text!r} is not a LoRA file: write FILE.safetensors or FILE.safetensors:SCALE.")
        try:
            number = float(scale)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise CheckpointError(f"{scale!r} is not a LoRA scale: write a number, such as {path}:0.8.")
        return cls(Path(path), number)

    def __str__(self) -> str:
        return f"{self.path.name}:{self.scale:g}"


def check_lora(path: Path) -> None:
    """Raise CheckpointError unless the tensor names are those of a LoRA. Shapes are checked when it is fused."""
    shapes, _ = read_header(path)
    for sign, kind in _UNSUPPORTED.items():
        if any(re.search(sign, key) for key in shapes):
            raise CheckpointError(f"{path.name} is {kind}. Supported: LoRAs for Stable Diffusion 1.x and 2.x.")
    if not any("lora" in key for key in shapes):
        raise CheckpointError(f"{path.name} is not a LoRA: none of its tensors is named like one.")
