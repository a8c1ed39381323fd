"""Fuse LoRAs into the weights of the UNet and the text encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from engines.checkpoints.adapters.lora import Lora
from engines.checkpoints.loading.finite import is_finite
from engines.errors import CheckpointError
from engines.lora.file import read_lora
from engines.lora.names import Target
from engines.lora.updates import Shape, Update, outline, updates
from engines.manifest import LoraPart


def fuse_lora(lora: Lora, parts: Mapping[LoraPart, nn.Module]) -> None:
    """Add the update of each layer that the file names to its weight.

    Args:
        lora: the file, and the scale of its updates.
        parts: a diffusers UNet, and the text encoders of transformers.

    Raises:
        CheckpointError: the file is damaged, or made for another model or with options that are not supported.
    """
    weights = {target: weight for part, module in parts.items() for target, weight in _weights(part, module)}
    file = read_lora(lora.path)
    shapes = {target: Shape(len(weight), weight[0].numel()) for target, weight in weights.items()}
    for update in updates(file, outline(file.header, shapes)):
        weight = weights[update.target]
        with torch.no_grad():
            weight += lora.scale * update.scale * _product(update).view_as(weight)
        if not is_finite(weight):
            raise CheckpointError(f"{lora} makes the layer {update.layer} overflow: pass a smaller scale.")


def _weights(part: LoraPart, module: nn.Module) -> Iterator[tuple[Target, Tensor]]:
    """The weights that LoRAs may update, in the order of the modules."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            yield Target(part, name), layer.weight


def _product(update: Update) -> Tensor:
    """up @ down, [out, in, …kernel]; with `mid` between them, the convolution of all three."""
    up, down = torch.from_numpy(update.up), torch.from_numpy(update.down)
    if update.mid is None:
        return up @ down.flatten(1)
    return torch.einsum("or,rskl,si->oikl", up, torch.from_numpy(update.mid), down.flatten(1))
