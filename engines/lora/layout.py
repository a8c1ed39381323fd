"""Where the factors of each layer lie within one rank of the LoRA pool."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from engines.manifest import LoraLayer, LoraPart


class UpdatedLayer(NamedTuple):
    """A linear layer, or a 1x1 convolution, of the model."""

    part: LoraPart
    name: str  # the module's name within its part
    inputs: int
    outputs: int


def lay_out(layers: Iterable[UpdatedLayer]) -> tuple[LoraLayer, ...]:
    """Assign every layer the positions of its factors, in the order of `layers`.

    Factors of one width lie together, each at a multiple of its width, and so does the end (see `width_of`): graphs see
    the pool as a table of vectors of that width, and gather what a row needs without touching the rest.
    """
    layers = list(layers)
    factors = defaultdict[int, list[tuple[int, str]]](list)
    for index, layer in enumerate(layers):
        factors[layer.inputs].append((index, "down"))
        factors[layer.outputs].append((index, "up"))
    positions: dict[tuple[int, str], int] = {}
    end = 0
    for width in sorted(factors, reverse=True):
        end = _round_up(end, width)
        for factor in factors[width]:
            positions[factor] = end
            end += width
    return tuple(
        LoraLayer(**layer._asdict(), down=positions[index, "down"], up=positions[index, "up"])
        for index, layer in enumerate(layers)
    )


def width_of(layers: Iterable[LoraLayer]) -> int:
    """The values of one rank, padding included: a multiple of the width of every factor."""
    layers = list(layers)
    end = max(max(layer.down + layer.inputs, layer.up + layer.outputs) for layer in layers)
    return _round_up(end, math.lcm(*(width for layer in layers for width in (layer.inputs, layer.outputs))))


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
