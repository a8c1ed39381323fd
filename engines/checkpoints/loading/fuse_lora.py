"""Fuse LoRAs into the weights of the UNet and the text encoder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from engines.checkpoints.adapters.lora import Lora, embeddings_in
from engines.checkpoints.adapters.lora_scaling import read_scaling
from engines.checkpoints.errors import CheckpointError
from engines.checkpoints.loading.finite import check_finite, is_finite
from engines.checkpoints.loading.libraries import load_tensors
from engines.checkpoints.loading.lora_layers import layers_by_name, read_name
from engines.checkpoints.safetensors_header import read_header

_OTHER_MODEL = "it was made for another model"


def fuse_lora(lora: Lora, *, unet: nn.Module, text_encoder: nn.Module) -> None:
    """W += scale · alpha / rank · up @ down, Hu et al. (2021), section 4.1, for each layer that the file names.

    Raises:
        CheckpointError: the file is damaged, or made for another model or with options that are not supported.
    """
    name, scaling = lora.path.name, read_scaling(lora.path)
    named = layers_by_name(unet, text_encoder, read_header(lora.path)[1])
    for layer, factors in _factors(lora).items():
        if (target := named.get(layer)) is None:
            raise CheckpointError(f"{name} updates the layer {layer}, which this model does not have: {_OTHER_MODEL}.")
        weight = target.module.weight
        update = _update(factors, layer, name)
        if update.numel() != weight.numel() or len(update) != len(weight):
            raise CheckpointError(
                f"{name} does not fit the shape of the layer {layer}: its update is {list(update.shape)}, the weight "
                f"{list(weight.shape)}: {_OTHER_MODEL}."
            )
        rank = len(factors["down"])
        own = float(factors["alpha"]) / rank if "alpha" in factors else scaling[target.part].of(target.name, rank)
        with torch.no_grad():
            weight += lora.scale * own * update.view_as(weight)
        if not is_finite(weight):
            raise CheckpointError(f"{lora} makes the layer {layer} overflow: pass a smaller scale.")


def _update(factors: Mapping[str, Tensor], layer: str, file: str) -> Tensor:
    """Return up @ down, [out, in, …kernel]; with `mid` between them, the convolution of all three."""
    if lacking := {"up", "down"} - factors.keys():
        raise CheckpointError(
            f"{file} lacks the factor {' and '.join(sorted(lacking))} of the layer {layer}: it is incomplete. "
            "Download it again."
        )
    up, down = factors["up"].float().flatten(1), factors["down"].float()
    mid = factors.get("mid")
    rank = len(down)
    if up.shape[1] != (rank if mid is None else len(mid)) or (mid is not None and mid.shape[1] != rank):
        shapes = ", ".join(f"{kind} {list(factor.shape)}" for kind, factor in sorted(factors.items()) if factor.ndim)
        raise CheckpointError(
            f"{file} does not fit the shape of its own factors in the layer {layer} ({shapes}): it is damaged."
        )
    if mid is None:
        return (up @ down.flatten(1)).view(len(up), *down.shape[1:])
    return torch.einsum("or,rskl,si->oikl", up, mid.float(), down.flatten(1))


def _factors(lora: Lora) -> dict[str, dict[str, Tensor]]:
    """Return the factors of every layer, by the file's name for it."""
    path = lora.path
    learned = {token.key for embedding in embeddings_in([lora]) for token in embedding.learned_tokens}
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    adapters = set[str | None]()
    for name, tensor in load_tensors(path).items():
        if name in learned:
            continue  # added to the text encoder's vocabulary
        factor = read_name(name)
        if factor is None:
            raise CheckpointError(f"{path.name} holds {name}, which is not a known factor of a LoRA.")
        check_finite([(name, tensor)], str(path))
        layers[factor.layer][factor.kind] = tensor
        adapters |= {factor.adapter} if factor.kind in ("down", "up") else set()
    if len(adapters) > 1:
        names = ", ".join(sorted(str(adapter or "without a name") for adapter in adapters))
        raise CheckpointError(f"{path.name} holds several adapters ({names}): save each to a file of its own.")
    return layers
