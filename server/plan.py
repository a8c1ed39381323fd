"""The plan of one step: the few kilobytes that tell the device what to do. Pure numbers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engines.base import LANES, TERMS, Array
from server.noise import NoiseGenerator
from server.request import Request


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a running request lives on the device, and where its noise comes from."""

    request: Request
    slots: tuple[int, ...]  # one per image
    prompts: tuple[int, ...]  # context rows: the prompt's and, for a guided request, the negative prompt's
    noise: tuple[NoiseGenerator, ...]  # one per image
    hold: ExitStack  # frees all of it


@dataclass(slots=True)
class Plan:
    """One step's inputs to the denoise graph, for B images in R rows; see `engines/graphs.py` for each."""

    placements: tuple[Placement, ...]
    arrays: dict[str, Array] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return len(self.arrays["slot"])

    @property
    def rows(self) -> int:
        return len(self.arrays["timestep"])


def make_plan(placements: Sequence[Placement], latent_shape: tuple[int, int, int]) -> Plan:
    """Plan the next step of every placed request; `latent_shape` is [channels, h, w].

    Stochastic schedulers draw their noise here, so a plan must be run, or its requests ended.
    """
    images = sum(len(placement.slots) for placement in placements)
    rows = sum(placement.request.rows for placement in placements)
    row_image = np.zeros(rows, np.int64)
    row_context = np.zeros(rows, np.int64)
    timestep = np.zeros(rows, np.float32)
    guidance = np.zeros((images, rows), np.float32)
    guidance_embedded = np.zeros(rows, np.float32)
    scale = np.zeros(images, np.float32)
    coef = np.zeros((images, LANES, TERMS), np.float32)
    noise = np.zeros((images, *latent_shape), np.float32)
    image = row = 0
    for placement in placements:
        table = placement.request.table
        step = table.steps[placement.request.step]
        for generator in placement.noise:
            scale[image] = step.scale
            coef[image] = step.matrix
            if table.stochastic:
                noise[image] = generator.randn(latent_shape)
            for context, weight in _guidance(placement):
                row_image[row] = image
                row_context[row] = context
                timestep[row] = step.timestep
                guidance[image, row] = weight
                guidance_embedded[row] = placement.request.wish.guidance_scale - 1
                row += 1
            image += 1
    slot: NDArray[np.int64] = np.array([slot for placement in placements for slot in placement.slots], np.int64)
    told = {"guidance_embedded": guidance_embedded} if placements[0].request.wish.embeds_guidance else {}
    return Plan(
        tuple(placements),
        {
            "noise": noise,
            "slot": slot,
            "row_image": row_image,
            "row_context": row_context,
            "timestep": timestep,
            "guidance": guidance,
            "scale": scale,
            "coef": coef,
            **told,
        },
    )


def _guidance(placement: Placement) -> tuple[tuple[int, float], ...]:
    """The context row and weight of each UNet row of one image; Ho & Salimans (2022), eq. 6."""
    wish = placement.request.wish
    g = wish.guidance_scale if wish.guided else 1.0
    return tuple(zip(placement.prompts, (g, 1 - g), strict=False))
