"""Small LoRAs for the layers of a bundle, as kohya's tools write them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from engines.manifest import LoraPart, Manifest

_PREFIXES: Mapping[LoraPart, str] = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def write_lora(
    path: Path,
    manifest: Manifest,
    *,
    rank: int = 2,
    seed: int = 0,
    parts: Collection[LoraPart] = tuple(_PREFIXES),
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write random factors for every layer of `parts` that the bundle's graphs update."""
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in manifest.lora_layers:
        if layer.part in parts:
            name = f"{_PREFIXES[layer.part]}_{layer.name.replace('.', '_')}"
            for factor, shape in (("down", (rank, layer.inputs)), ("up", (layer.outputs, rank))):
                values = random.standard_normal(shape, np.float32) * 0.1
                tensors[f"{name}.lora_{factor}.weight"] = values.astype(np.float16)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, dict(metadata or {}))
    return path
