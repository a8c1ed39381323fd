"""The plan of one step: the few kilobytes that tell the device what to do. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from engines.contract import LANES, TERMS, Array
from engines.schedulers import NUMBERS
from server.requests.request import Depth, Request
from server.runtime.noise import NoiseGenerator

_STILL = np.zeros(NUMBERS, np.float32)  # a step that changes nothing


RowConditioning = tuple[tuple[tuple[int, ...], float], ...]  # the context rows and weight of each UNet row of one image


@dataclass(frozen=True, eq=False)
class Placement:
    """Where a running request lives on the device, and where its noise comes from."""

    request: Request
    slots: tuple[int, ...]  # one per image
    prompts: tuple[tuple[int, ...], ...]  # context rows of the prompt's chunks and, if guided, the negative prompt's
    noise: tuple[NoiseGenerator, ...]  # one per image
    features: tuple[tuple[int, ...], ...]  # for each image, places for those of its rows; none where it caches nothing
    hold: ExitStack  # frees all of it

    @property
    def rows(self) -> RowConditioning:
        """Of the next step."""
        return self._guided if self.request.guided[self.request.step] else self._unguided

    @cached_property
    def _guided(self) -> RowConditioning:
        """Ho & Salimans (2022), eq. 6."""
        g = self.request.params.guidance_scale
        return (self.prompts[0], g), (self.prompts[1], 1 - g)

    @cached_property
    def _unguided(self) -> RowConditioning:
        return ((self.prompts[0], 1.0),)

    @property
    def draws(self) -> bool:
        """Whether the next step takes fresh noise."""
        return self.request.table.steps[self.request.step].draws


class StepShape(NamedTuple):
    """How large a step's inputs are; engines are bound once for each."""

    images: int
    rows: int  # of the UNet
    chunks: int  # of prompts, that each row is told
    depth: Depth = "full"


class RowLayout(NamedTuple):
    """Who has which image and which rows of a step: the same from step to step until somebody comes or goes."""

    told: Sequence[tuple[Placement, RowConditioning]]
    rows: int  # that somebody asked for; the shape's others only fill it up
    shape: StepShape
    arrays: dict[str, Array]
    feature_copies: tuple[tuple[int, int], ...]  # rows of which the features are kept, and in which places


class Plan(NamedTuple):
    """One step's inputs to the denoise graph, without `noise` where no request draws any; see `engines.contract`."""

    placements: Sequence[Placement]
    layout: RowLayout
    finishing: tuple[Request, ...]  # whose last step it is
    arrays: dict[str, Array]

    @property
    def rows(self) -> int:
        """Of the UNet, that somebody asked for."""
        return self.layout.rows

    @property
    def shape(self) -> StepShape:
        return self.layout.shape

    @property
    def feature_copies(self) -> tuple[tuple[int, int], ...]:
        """Rows of which the features are kept, and in which places."""
        return self.layout.feature_copies

    def __str__(self) -> str:
        ids = ", ".join(placement.request.id for placement in self.placements)
        return f"A step of {self.rows} rows at {self.placements[0].request.params.size} ({ids})"


def step_shape(placements: Sequence[Placement]) -> StepShape:
    """What one step of all `placements`, which are due for one of the same depth, takes."""
    images = rows = 0
    chunks = set[int]()
    for placement in placements:
        told = placement.rows
        images += len(placement.slots)
        rows += len(placement.slots) * len(told)
        chunks.update([len(prompt) for prompt, _weight in told])
    return StepShape(images, rows, math.lcm(*chunks), placements[0].request.depth)


def make_plan(
    placements: Sequence[Placement],
    latent_shape: tuple[int, int, int],
    *,
    shape: StepShape,
    spare: int,
    embeds_guidance: bool = False,
    before: RowLayout | None = None,
) -> Plan:
    """Plan the next step of every placed request, filled up to `shape`; `latent_shape` is [channels, h, w].

    What fills up is images of the slot `spare`, with features of the place of that number: nobody owns either.
    `before` is how those of an earlier plan with the same `spare` were seated, and is kept where they are the same.
    Stochastic schedulers draw their noise here, so a plan must be run, or its requests ended.
    """
    told = [(placement, placement.rows) for placement in placements]
    if before and before.told == told and before.shape == shape:
        layout = before
    else:
        layout = _lay_out(told, shape, spare=spare, embeds_guidance=embeds_guidance)
    numbers = [
        placement.request.table.numbers[placement.request.step] for placement in placements for _slot in placement.slots
    ]
    numbers += [_STILL] * (shape.images - len(numbers))
    by_image = np.concatenate(numbers).reshape(shape.images, NUMBERS)
    arrays: dict[str, Array] = {
        **layout.arrays,
        "timestep": by_image[layout.arrays["row_image"], 0],
        "scale": by_image[:, 1],
        "level": by_image[:, 2:4],
        "coef": by_image[:, 4:].reshape(shape.images, LANES, TERMS),
    }
    if any(placement.draws for placement in placements):
        arrays["noise"] = _draw(placements, (shape.images, *latent_shape))
    finishing = tuple([one.request for one in placements if one.request.step + 1 == one.request.steps])
    return Plan(placements, layout, finishing, arrays)


def _lay_out(
    told: Sequence[tuple[Placement, RowConditioning]], shape: StepShape, *, spare: int, embeds_guidance: bool
) -> RowLayout:
    """Give every image its place in the step, and every row its image and prompt."""
    images, rows, chunks, depth = shape
    # Lists grow by image and by row, and are arrays at once: as many assignments to arrays take several times as long.
    slots: list[int] = []
    row_image: list[int] = []
    contexts: list[tuple[int, ...]] = []
    weights: list[float] = []
    for placement, prompts in told:
        for slot in placement.slots:
            for prompt, weight in prompts:
                row_image.append(len(slots))
                contexts.append(prompt * (chunks // len(prompt)))  # attention does not notice whole repetitions
                weights.append(weight)
            slots.append(slot)
    spare_rows = rows - len(contexts)
    # Never more images than rows: where rows are spare, so is the last image, whose they are.
    of_image = np.array(row_image + [images - 1] * spare_rows, np.int64)
    guidance = np.zeros((images, rows), np.float32)
    guidance[of_image, np.arange(rows)] = weights + [0.0] * spare_rows
    arrays: dict[str, Array] = {
        "slot": np.array(slots + [spare] * (images - len(slots)), np.int64),
        "row_image": of_image,
        "row_context": np.array(contexts + [(0,) * chunks] * spare_rows, np.int64),
        "guidance": guidance,
    }
    places = _feature_places(told, spare)
    if depth == "shallow":
        arrays["row_feature"] = np.array(places + [spare] * spare_rows, np.int64)
    if embeds_guidance:
        scales = [one.request.params.guidance_scale - 1 for one, prompts in told for _ in one.slots for _ in prompts]
        arrays["guidance_embedded"] = np.array(scales + [0.0] * spare_rows, np.float32)
    feature_copies = (
        tuple([(row, place) for row, place in enumerate(places) if place != spare]) if depth == "full" else ()
    )
    return RowLayout(told, len(contexts), shape, arrays, feature_copies)


def _feature_places(told: Sequence[tuple[Placement, RowConditioning]], spare: int) -> list[int]:
    """Of each row, `spare` where none are kept; nothing at all if that goes for everybody."""
    if not any(placement.features for placement, _prompts in told):
        return []
    places: list[int] = []
    for placement, prompts in told:
        for image in placement.features or [(spare,) * len(prompts)] * len(placement.slots):
            places += image[: len(prompts)]
    return places


def _draw(placements: Sequence[Placement], shape: tuple[int, ...]) -> Array:
    """Fresh noise of `shape`, [images, channels, h, w] f32, for the images that draw any."""
    noise = np.zeros(shape, np.float32)
    image = 0
    for placement in placements:
        if placement.draws:
            for index, generator in enumerate(placement.noise, start=image):
                noise[index] = generator.randn(shape[1:])
        image += len(placement.slots)
    return noise
