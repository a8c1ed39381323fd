"""Fuse LoRAs into the weights of the UNet and the text encoder."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.checkpoints.errors import CheckpointError
from engines.checkpoints.loading.libraries import load_tensors
from engines.checkpoints.lora import Lora
from engines.checkpoints.safetensors_header import read_header

# The two factors of a layer's update and its alpha, by the name endings of different training tools.
_FACTORS = {
    ".lora_down.weight": "down",  # kohya
    ".lora_up.weight": "up",
    ".alpha": "alpha",
    ".lora_A.weight": "down",  # peft
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",  # diffusers
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",  # diffusers' attention processors
    "_lora.up.weight": "up",
}
_UNSUPPORTED_OPTIONS = (".use_rslora", ".use_dora", ".alpha_pattern")
_OTHER_MODEL = "it was made for another model"
_Layer = nn.Linear | nn.Conv2d


def fuse_lora(lora: Lora, *, unet: nn.Module, text_encoder: nn.Module) -> None:
    """W += scale · alpha / rank · up @ down, Hu et al. (2021), section 4.1, for each layer that the file names.

    Raises:
        CheckpointError: the file is damaged, or made for another model or with options that are not supported.
    """
    named, alphas = _layers_by_name(unet, text_encoder), _alphas(lora.path)
    for layer, factors in _factors(lora.path).items():
        part, module = named.get(layer) or named.get(f"{layer}.0") or (None, None)
        if part is None or module is None:
            raise CheckpointError(
                f"{lora.path.name} updates the layer {layer}, which this model does not have: {_OTHER_MODEL}."
            )
        update = _update(factors, alphas.get(part))
        if update is None or update.numel() != module.weight.numel() or len(update) != len(module.weight):
            raise CheckpointError(f"{lora.path.name} does not fit the shape of the layer {layer}: {_OTHER_MODEL}.")
        with torch.no_grad():
            module.weight += lora.scale * update.view_as(module.weight)


def _update(factors: Mapping[str, Tensor], alpha: float | None) -> Tensor | None:
    """Return alpha / rank · up @ down, [out, in · kernel]; None where the factors do not fit each other."""
    if not {"up", "down"} <= set(factors):
        return None
    up, down = factors["up"].float().flatten(1), factors["down"].float().flatten(1)
    rank = len(down)
    if up.shape[1] != rank:
        return None
    scale = float(factors["alpha"]) if "alpha" in factors else alpha
    return (up @ down) * (1.0 if scale is None else scale / rank)


def _factors(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return the factors of every layer, by the file's name for it."""
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in load_tensors(path).items():
        suffix = next((suffix for suffix in _FACTORS if name.endswith(suffix)), None)
        if suffix is None:
            raise CheckpointError(f"{path.name} holds {name}, which is not a known factor of a LoRA.")
        layer = name.removesuffix(suffix).removeprefix("base_model.model.").replace(".processor.", ".")
        layers[layer][_FACTORS[suffix]] = tensor
    return layers


def _layers_by_name(unet: nn.Module, text_encoder: nn.Module) -> dict[str, tuple[str, _Layer]]:
    """Return every layer that a LoRA may update, and its part, under each name that files have for it."""
    named: dict[str, tuple[str, _Layer]] = {}
    for name, layer in _updatable(unet):
        for alias in (name, f"unet.{name}", f"lora_unet_{name.replace('.', '_')}"):
            named[alias] = ("unet", layer)
    for name, layer in _updatable(text_encoder):
        full = f"text_model.{name}"  # a wrapper that transformers has removed, and files still name
        for alias in (full, f"text_encoder.{full}", f"lora_te_{full.replace('.', '_')}"):
            named[alias] = ("text_encoder", layer)
    return named


def _updatable(module: nn.Module) -> Iterator[tuple[str, _Layer]]:
    for name, layer in module.named_modules():
        if isinstance(layer, _Layer):
            yield name, layer


def _alphas(path: Path) -> Mapping[str, float]:
    """Return each part's alpha where diffusers wrote it to the metadata, rather than as a tensor per layer."""
    config = _adapter_config(path)
    for key, value in config.items():
        if value and key.endswith(_UNSUPPORTED_OPTIONS):
            raise CheckpointError(f"{path.name} was trained with {key}, which is not supported.")
    return {key.removesuffix(".lora_alpha"): float(config[key]) for key in config if key.endswith(".lora_alpha")}


def _adapter_config(path: Path) -> dict[str, Any]:
    try:
        config = dict(json.loads(read_header(path)[1].get("lora_adapter_metadata", "{}")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} has metadata that cannot be read: {error}") from error
    return {key if "." in key else f"unet.{key}": value for key, value in config.items()}
