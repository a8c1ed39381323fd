"""The plan of one step: the few kilobytes that tell the device what to do. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engines.base import LANES, TERMS, Array
from server.noise import NoiseGenerator
from server.request import Depth, Request

_PICTURE = (1.0, 0.0)  # signal and noise, when all steps are done


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a running request lives on the device, and where its noise comes from."""

    request: Request
    slots: tuple[int, ...]  # one per image
    prompts: tuple[tuple[int, ...], ...]  # context rows of the prompt's chunks and, if guided, the negative prompt's
    noise: tuple[NoiseGenerator, ...]  # one per image
    features: tuple[tuple[int, ...], ...]  # for each image, places for those of its rows; none where it caches nothing
    hold: ExitStack  # frees all of it

    @property
    def rows(self) -> tuple[tuple[tuple[int, ...], float], ...]:
        """The context rows and weight of each UNet row of one image; Ho & Salimans (2022), eq. 6."""
        if not self.request.guided_at(self.request.step):
            return ((self.prompts[0], 1.0),)
        g = self.request.wish.guidance_scale
        return (self.prompts[0], g), (self.prompts[1], 1 - g)


class StepShape(NamedTuple):
    """How large a step's inputs are; engines are bound once for each."""

    images: int
    rows: int  # of the UNet
    chunks: int  # of prompts, that each row is told
    depth: Depth = "full"


@dataclass(frozen=True, slots=True)
class Plan:
    """One step's inputs to the denoise graph, without `noise` where nobody draws any; see `engines/graphs.py`."""

    placements: tuple[Placement, ...]
    rows: int  # that somebody asked for; the shape's others only fill it up
    shape: StepShape
    arrays: dict[str, Array]
    keeps: tuple[tuple[int, int], ...] = ()  # rows of which the features are kept, and in which places


def step_shape(placements: Sequence[Placement]) -> StepShape:
    """What one step of all `placements`, which are due for one of the same depth, takes."""
    told = [(len(placement.slots), placement.rows) for placement in placements]
    return StepShape(
        images=sum(images for images, _rows in told),
        rows=sum(images * len(rows) for images, rows in told),
        chunks=math.lcm(*(len(prompt) for _images, rows in told for prompt, _weight in rows)),
        depth=placements[0].request.depth,
    )


def make_plan(
    placements: Sequence[Placement],
    latent_shape: tuple[int, int, int],
    *,
    shape: StepShape,
    spare: int,
    embeds_guidance: bool = False,
) -> Plan:
    """Plan the next step of every placed request, filled up to `shape`; `latent_shape` is [channels, h, w].

    What fills up is images of the slot `spare`, with features of the place of that number: nobody owns either.
    Stochastic schedulers draw their noise here, so a plan must be run, or its requests ended.
    """
    images, rows, chunks, depth = shape
    slot = np.full(images, spare, np.int64)
    row_image = np.full(rows, images - 1, np.int64)  # never more images than rows: where rows are spare, so is the last
    timestep = np.zeros(rows, np.float32)
    guidance = np.zeros((images, rows), np.float32)
    guidance_embedded = np.zeros(rows, np.float32)
    scale = np.zeros(images, np.float32)
    coef = np.zeros((images, LANES, TERMS), np.float32)
    noise: Array | None = None
    # Small tuples go into an array one by one in nearly the time that all of them take at once.
    levels: list[tuple[float, float]] = []
    contexts: list[tuple[int, ...]] = []
    places: list[int] = []  # by row, of features; spare where none are kept
    image = row = 0
    for placement in placements:
        request = placement.request
        step, *later = request.table.steps[request.step : request.step + 2]
        told = placement.rows
        for index, generator in enumerate(placement.noise):
            slot[image] = placement.slots[index]
            scale[image] = step.scale
            coef[image] = step.matrix
            levels.append(later[0].level if later else _PICTURE)
            if step.draws:
                noise = np.zeros((images, *latent_shape), np.float32) if noise is None else noise
                noise[image] = generator.randn(latent_shape)
            features = placement.features[index] if placement.features else (spare,) * len(told)
            places += features[: len(told)]
            for prompt, weight in told:
                row_image[row] = image
                contexts.append(prompt * (chunks // len(prompt)))  # attention does not notice whole repetitions
                timestep[row] = step.timestep
                guidance[image, row] = weight
                guidance_embedded[row] = request.wish.guidance_scale - 1
                row += 1
            image += 1
    arrays: dict[str, Array] = {
        "slot": slot,
        "row_image": row_image,
        "row_context": np.array(contexts + [(0,) * chunks] * (rows - row), np.int64),
        "timestep": timestep,
        "guidance": guidance,
        "scale": scale,
        "coef": coef,
        "level": np.array(levels + [(0.0, 0.0)] * (images - image), np.float32),
    }
    if depth == "shallow":
        arrays["row_feature"] = np.array(places + [spare] * (rows - row), np.int64)
    if embeds_guidance:
        arrays["guidance_embedded"] = guidance_embedded
    if noise is not None:
        arrays["noise"] = noise
    keeps = tuple((row, place) for row, place in enumerate(places) if place != spare) if depth == "full" else ()
    return Plan(tuple(placements), row, shape, arrays, keeps)
