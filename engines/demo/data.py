"""The training images as tensors: every glyph at every placement, kept in memory and composed on demand."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engines.demo.pictures import concepts, layer, placements

BATCH = 64  # images


@dataclass(frozen=True)
class Layers:
    """Every thing at every placement, and the background colors."""

    paint: Tensor  # [T * P, 3, 64, 64] u8, premultiplied RGB
    alpha: Tensor  # [T * P, 1, 64, 64] u8
    colors: Tensor  # [K, 3] f32 in 0..255

    def compose(self, index: Tensor, color: Tensor) -> Tensor:
        """Return images [n, 3, 64, 64] f32 in -1..1 of layers `index` [n] on background colors `color` [n]."""
        paint, alpha = self.paint[index].float(), self.alpha[index].float() / 255
        ground = self.colors[color][:, :, None, None]
        return (paint + (1 - alpha) * ground) / 127.5 - 1

    def compose_all(self, index: Tensor, color: Tensor) -> Iterator[Tensor]:
        """Yield the same in batches of 64 images."""
        for start in range(0, len(index), BATCH):
            part = slice(start, start + BATCH)
            yield self.compose(index[part], color[part])


@dataclass(frozen=True)
class Split:
    """Indices of the layers to train on, and of those held out."""

    train: Tensor  # [n] i64
    held_out: Tensor  # [m] i64


def load_layers() -> Layers:
    """Compose every layer from the atlas; takes about ten seconds and 160 MB."""
    drawn = [np.asarray(layer(thing, place)) for thing in concepts().things for place in placements()]
    rgba = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)
    alpha = rgba[:, 3:].contiguous()
    paint = torch.empty_like(rgba[:, :3], memory_format=torch.contiguous_format)
    for start in range(0, len(rgba), 1000):
        part = slice(start, start + 1000)
        paint[part] = (rgba[part, :3].float() * alpha[part].float() / 255).round().to(torch.uint8)
    return Layers(paint, alpha, torch.tensor(list(concepts().colors.values()), dtype=torch.float32))


def split(seed: int, held_out: int = 512) -> Split:
    """Split the layers; the same seed holds out the same ones."""
    count = len(concepts().things) * len(placements())
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return Split(order[held_out:], order[:held_out])


@dataclass(frozen=True)
class Pairs:
    """Each (thing, color) at several random placements: the UNet's training set."""

    layer: Tensor  # [n] i64
    color: Tensor  # [n] i64

    def names(self, index: int) -> tuple[str, str]:
        """Return the thing and the color of one image."""
        thing = int(self.layer[index]) // len(placements())
        return concepts().things[thing], list(concepts().colors)[int(self.color[index])]


def draw_pairs(places: int, seed: int) -> Pairs:
    """Draw `places` different placements for every (thing, color)."""
    rng = random.Random(seed)  # noqa: S311
    per_thing = len(placements())
    drawn = [
        (thing * per_thing + place, color)
        for thing in range(len(concepts().things))
        for color in range(len(concepts().colors))
        for place in rng.sample(range(per_thing), places)
    ]
    layers, colors = zip(*drawn, strict=True)
    return Pairs(torch.tensor(layers), torch.tensor(colors))
