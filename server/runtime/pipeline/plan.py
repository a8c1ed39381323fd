"""The plan of one step: the few kilobytes of indices and coefficients that the host writes for it. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engines.contract import LANES, TERMS, Array
from engines.schedulers import NUMBERS
from server.requests.depths import Depth
from server.runtime.pipeline.admission import Placement, RowConditioning
from server.runtime.pipeline.lora_pool import ZERO_RANK

_PADDING = np.zeros(NUMBERS, np.float32)  # the scheduler's numbers for an image of the spare slot


class StepShape(NamedTuple):
    """The sizes of a step's inputs; engines are bound once for each."""

    images: int
    rows: int  # UNet rows
    chunks: int  # chunks of a prompt per row
    depth: Depth = "full"
    ranks: int = 0  # of LoRAs per row; none is a step of the plain graph


class RowLayout(NamedTuple):
    """Which image and which rows of a step belong to whom: the same from step to step until requests change."""

    conditioning: Sequence[tuple[Placement, Sequence[RowConditioning]]]
    rows: int  # UNet rows of requests; the shape's others are padding
    shape: StepShape
    arrays: dict[str, Array]
    feature_copies: tuple[tuple[int, int], ...]  # (row, place) for each row whose features are kept after the step


class Plan(NamedTuple):
    """One step's inputs by the names of `engines.contract`; `noise` only if a request draws it."""

    placements: Sequence[Placement]
    layout: RowLayout
    arrays: dict[str, Array]

    @property
    def rows(self) -> int:
        """UNet rows of requests, without padding."""
        return self.layout.rows

    @property
    def shape(self) -> StepShape:
        return self.layout.shape

    @property
    def feature_copies(self) -> tuple[tuple[int, int], ...]:
        """(row, place) for each row whose features are kept after the step."""
        return self.layout.feature_copies

    @property
    def reads_guidance(self) -> bool:
        """Whether a request ends its guidance by itself, and so asks how much it changes."""
        return any(placement.request.params.ends_guidance for placement in self.placements)

    def describe(self) -> str:
        """Its requests, and its numbers without those that fill pages."""
        ids = ", ".join(placement.request.id for placement in self.placements)
        return f"of {ids}: { ({name: array.tolist() for name, array in self.arrays.items() if array.size <= 64}) }"

    def __str__(self) -> str:
        ids = ", ".join(placement.request.id for placement in self.placements)
        return f"A step of {self.rows} rows at {self.placements[0].request.params.size} ({ids})"


def step_shape(placements: Sequence[Placement]) -> StepShape:
    """The shape of one step of all `placements`, which are due for a step of the same depth, without padding."""
    images = rows = ranks = 0
    chunks = set[int]()
    for placement in placements:
        conditioning = placement.conditioning
        ranks = max(ranks, len(placement.ranks.rows))
        images += len(conditioning)
        for prompts in conditioning:
            rows += len(prompts)
            chunks.update([len(prompt) for prompt, _weight in prompts])
    return StepShape(images, rows, math.lcm(*chunks), placements[0].request.depth, ranks)


def make_plan(
    placements: Sequence[Placement],
    latent_shape: tuple[int, int, int],
    *,
    shape: StepShape,
    spare: int,
    before: RowLayout | None = None,
) -> Plan:
    """Plan the next step of every placed request, padded to `shape`; `latent_shape` is [channels, h, w].

    Padding is images of the slot `spare`, and rows with the features of the place of that number: no request owns
    either. `before` is the layout of an earlier plan with the same `spare`, and is reused if nothing in it changed.
    The noise of stochastic schedulers is taken here, so a plan must be run, or its requests ended.
    """
    conditioning = [(placement, placement.conditioning) for placement in placements]
    if before and before.conditioning == conditioning and before.shape == shape:
        layout = before
    else:
        layout = _lay_out(conditioning, shape, spare=spare)
    numbers = [
        placement.request.table.numbers[placement.request.step] for placement in placements for _slot in placement.slots
    ]
    numbers += [_PADDING] * (shape.images - len(numbers))
    by_image = np.concatenate(numbers).reshape(shape.images, NUMBERS)
    arrays: dict[str, Array] = {
        **layout.arrays,
        "timestep": by_image[layout.arrays["row_image"], 0],
        "scale": by_image[:, 1],
        "level": by_image[:, 2:4],
        "coef": by_image[:, 4:].reshape(shape.images, LANES, TERMS),
    }
    if any(placement.draws_noise for placement in placements):
        arrays["noise"] = _draw(placements, (shape.images, *latent_shape))
    return Plan(placements, layout, arrays)


def _lay_out(
    conditioning: Sequence[tuple[Placement, Sequence[RowConditioning]]], shape: StepShape, *, spare: int
) -> RowLayout:
    """Assign every image its position in the step, and every row its image and prompt."""
    images, rows, chunks, depth, ranks = shape
    # Lists grow by image and by row, and become arrays at once: piecewise assignment takes several times as long.
    slots: list[int] = []
    row_image: list[int] = []
    contexts: list[tuple[int, ...]] = []
    weights: list[float] = []
    for placement, by_image in conditioning:
        for slot, prompts in zip(placement.slots, by_image, strict=True):
            for prompt, weight in prompts:
                row_image.append(len(slots))
                contexts.append(prompt * (chunks // len(prompt)))  # attention is the same over whole repetitions
                weights.append(weight)
            slots.append(slot)
    spare_rows = rows - len(contexts)
    # There are never more images than rows, so where rows are spare, the last image is spare too: they belong to it.
    of_image = np.array(row_image + [images - 1] * spare_rows, np.int64)
    guidance = np.zeros((images, rows), np.float32)
    guidance[of_image, np.arange(rows)] = weights + [0.0] * spare_rows
    # Spare rows weigh nothing, and read what others read too: any other row may be overwritten during the step.
    padding = contexts[:1] or [(0,) * chunks]
    arrays: dict[str, Array] = {
        "slot": np.array(slots + [spare] * (images - len(slots)), np.int64),
        "row_image": of_image,
        "row_context": np.array(contexts + padding * spare_rows, np.int64),
        "guidance": guidance,
    }
    places = _feature_places(conditioning, spare)
    if depth == "shallow":
        arrays["row_feature"] = np.array(places + [spare] * spare_rows, np.int64)
    arrays |= _unet_inputs(conditioning, spare_rows)
    if ranks:
        arrays |= _lora_ranks(conditioning, rows, ranks)
    kept = [(row, place) for row, place in enumerate(places) if place != spare] if depth == "full" else ()
    return RowLayout(conditioning, len(contexts), shape, arrays, tuple(kept))


def _rows_of(by_image: Sequence[RowConditioning]) -> int:
    """The UNet rows of one request."""
    return sum([len(prompts) for prompts in by_image])


def _unet_inputs(
    conditioning: Sequence[tuple[Placement, Sequence[RowConditioning]]], spare_rows: int
) -> dict[str, Array]:
    """The further inputs of the UNet, by port; those of requests of one model have the same names."""
    by_row = [
        placement.request.params.unet_inputs
        for placement, by_image in conditioning
        for _row in range(_rows_of(by_image))
    ]
    arrays = {}
    for name in by_row[0] if by_row else ():
        values = np.array([inputs[name] for inputs in by_row], np.float32)
        arrays[name] = np.concatenate([values, np.zeros((spare_rows, *values.shape[1:]), np.float32)])
    return arrays


def _lora_ranks(
    conditioning: Sequence[tuple[Placement, Sequence[RowConditioning]]], rows: int, ranks: int
) -> dict[str, Array]:
    """What updates each row; nothing does where the ranks are the pool's zero."""
    index = np.full((rows, ranks), ZERO_RANK, np.int64)
    weight = np.zeros((rows, ranks), np.float32)
    row = 0
    for placement, by_image in conditioning:
        end, count = row + _rows_of(by_image), len(placement.ranks.rows)
        index[row:end, :count], weight[row:end, :count] = placement.ranks
        row = end
    return {"row_lora": index, "lora_weight": weight}


def _feature_places(conditioning: Sequence[tuple[Placement, Sequence[RowConditioning]]], spare: int) -> list[int]:
    """The feature place of each row, `spare` where none is kept; empty if no request keeps features."""
    if not any(placement.features.by_image for placement, _by_image in conditioning):
        return []
    places: list[int] = []
    for placement, by_image in conditioning:
        kept = placement.features.by_image
        for image, prompts in enumerate(by_image):
            places += kept[image][: len(prompts)] if kept else [spare] * len(prompts)
    return places


def _draw(placements: Sequence[Placement], shape: tuple[int, ...]) -> Array:
    """Fresh noise of `shape`, [images, channels, h, w] f32, zero for images that draw none."""
    noise = np.zeros(shape, np.float32)
    image = 0
    for placement in placements:
        if placement.draws_noise:
            noise[image : image + len(placement.slots)] = placement.noise.take()
        image += len(placement.slots)
    return noise
