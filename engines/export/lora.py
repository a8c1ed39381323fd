"""Low-rank updates of a module's layers, each row of a batch by those of its own LoRAs.

Hu et al. (2021), LoRA, section 4.1: y = Wx + Σ w · up (down · x), summed over the ranks of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from engines.lora.layout import UpdatedLayer
from engines.manifest import LoraLayer, LoraPart


def updated_layers(part: LoraPart, module: nn.Module) -> Iterator[UpdatedLayer]:
    """The layers of a module that LoRAs may update: linear ones, and 1x1 convolutions."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            yield UpdatedLayer(part, name, layer.in_features, layer.out_features)
        elif isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
            yield UpdatedLayer(part, name, layer.in_channels, layer.out_channels)


def other_layers(module: nn.Module) -> Iterator[str]:
    """The names of layers that some LoRAs update and the pool has no place for: larger convolutions."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d) and (layer.kernel_size != (1, 1) or layer.groups != 1):
            yield name


class LoraUpdates:
    """Adds the updates of LoRAs to the outputs of a module's layers."""

    def __init__(self, part: LoraPart, module: nn.Module, layers: Sequence[LoraLayer]) -> None:
        self._layers = [(module.get_submodule(layer.name), layer) for layer in layers if layer.part == part]

    @contextmanager
    def applied(self, pool: Tensor, index: Tensor, weight: Tensor) -> Iterator[None]:
        """Within it, each row of what the layers are given is updated by the ranks `index` of the `pool`, weighted.

        Args:
            pool: [Q, G], f16.
            index, weight: [R, A].
        """
        hooks = [
            layer.register_forward_hook(partial(_add_update, pool, index, weight, place))
            for layer, place in self._layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def updated(
    updates: LoraUpdates, pool: Tensor | None, index: Tensor | None, weight: Tensor | None
) -> AbstractContextManager[None]:
    """As `LoraUpdates.applied`; nothing is updated where no LoRAs are given."""
    if pool is None or index is None or weight is None:
        return nullcontext()
    return updates.applied(pool, index, weight)


def _add_update(
    pool: Tensor, index: Tensor, weight: Tensor, place: LoraLayer, _layer: nn.Module, given: Any, made: Tensor
) -> Tensor:
    x: Tensor = given[0]
    down = _factors(pool, index, place.down, place.inputs).to(x.dtype)  # [R, A, in]
    up = _factors(pool, index, place.up, place.outputs).to(x.dtype)  # [R, A, out]
    scale = weight.to(x.dtype)
    if x.ndim == 4:  # [R, in, h, w]
        hidden = (down @ x.flatten(2)) * scale[:, :, None]
        return made + (up.mT @ hidden).view_as(made)
    rows = x[:, None] if x.ndim == 2 else x  # [R, n, in]
    update = ((rows @ down.mT) * scale[:, None, :]) @ up
    return made + (update[:, 0] if x.ndim == 2 else update)


def _factors(pool: Tensor, index: Tensor, position: int, width: int) -> Tensor:
    """The vectors of `width` at `position` of each rank: [R, A, width]."""
    per_rank = pool.shape[1] // width
    vectors: Tensor = pool.reshape(-1, width)[index * per_rank + position // width]
    return vectors
