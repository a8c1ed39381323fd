"""Fuse LoRAs into the weights of the UNet and the text encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engines.checkpoints.adapters.lora import Lora
from engines.checkpoints.loading.finite import is_finite
from engines.errors import CheckpointError
from engines.lora.file import read_lora
from engines.lora.names import Target
from engines.lora.updates import Shape, Update, outline, updates
from engines.manifest import LoraPart


def fuse_lora(lora: Lora, *, unet: nn.Module, text_encoder: nn.Module) -> None:
    """Add the update of each layer that the file names to its weight.

    Args:
        lora: the file, and the scale of its updates.
        unet: a diffusers UNet.
        text_encoder: a transformers CLIPTextModel.

    Raises:
        CheckpointError: the file is damaged, or made for another model or with options that are not supported.
    """
    weights = _weights("unet", unet) | _weights("text_encoder", text_encoder)
    file = read_lora(lora.path)
    shapes = {target: Shape(len(weight), weight[0].numel()) for target, weight in weights.items()}
    for update in updates(file, outline(file.header, shapes)):
        weight = weights[update.target]
        with torch.no_grad():
            weight += lora.scale * update.scale * _product(update).view_as(weight)
        if not is_finite(weight):
            raise CheckpointError(f"{lora} makes the layer {update.layer} overflow: pass a smaller scale.")


def _weights(part: LoraPart, module: nn.Module) -> dict[Target, Tensor]:
    """The weights that LoRAs may update, in the order of the modules."""
    return {
        Target(part, name): layer.weight
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def _product(update: Update) -> Tensor:
    """up @ down, [out, in, …kernel]; with `mid` between them, the convolution of all three."""
    up, down = torch.from_numpy(update.up), torch.from_numpy(update.down)
    if update.mid is None:
        return up @ down.flatten(1)
    return torch.einsum("or,rskl,si->oikl", up, torch.from_numpy(update.mid), down.flatten(1))
