"""The plan of one step: the few kilobytes that tell the device what to do. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engines.base import LANES, TERMS, Array
from server.noise import NoiseGenerator
from server.request import Request

_PICTURE = (1.0, 0.0)  # signal and noise, when all steps are done


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a running request lives on the device, and where its noise comes from."""

    request: Request
    slots: tuple[int, ...]  # one per image
    prompts: tuple[tuple[int, ...], ...]  # context rows of the prompt's chunks and, if guided, the negative prompt's
    noise: tuple[NoiseGenerator, ...]  # one per image
    hold: ExitStack  # frees all of it

    @property
    def rows(self) -> tuple[tuple[tuple[int, ...], float], ...]:
        """The context rows and weight of each UNet row of one image; Ho & Salimans (2022), eq. 6."""
        if not self.request.guided_now:
            return ((self.prompts[0], 1.0),)
        g = self.request.wish.guidance_scale
        return (self.prompts[0], g), (self.prompts[1], 1 - g)


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

    @property
    def chunks(self) -> int:
        """How many chunks of prompts each row is told."""
        return int(self.arrays["row_context"].shape[1])


def make_plan(placements: Sequence[Placement], latent_shape: tuple[int, int, int]) -> Plan:
    """Plan the next step of every placed request; `latent_shape` is [channels, h, w].

    Stochastic schedulers draw their noise here, so a plan must be run, or its requests ended.
    """
    images = sum(len(placement.slots) for placement in placements)
    rows = sum(len(placement.slots) * len(placement.rows) for placement in placements)
    chunks = math.lcm(*(len(prompt) for placement in placements for prompt, _weight in placement.rows))
    row_image = np.zeros(rows, np.int64)
    row_context = np.zeros((rows, chunks), np.int64)
    timestep = np.zeros(rows, np.float32)
    guidance = np.zeros((images, rows), np.float32)
    guidance_embedded = np.zeros(rows, np.float32)
    scale = np.zeros(images, np.float32)
    coef = np.zeros((images, LANES, TERMS), np.float32)
    level = np.zeros((images, 2), np.float32)
    noise = np.zeros((images, *latent_shape), np.float32)
    image = row = 0
    for placement in placements:
        request = placement.request
        step, *later = request.table.steps[request.step : request.step + 2]
        for generator in placement.noise:
            scale[image] = step.scale
            coef[image] = step.matrix
            level[image] = later[0].level if later else _PICTURE
            if step.draws:
                noise[image] = generator.randn(latent_shape)
            for prompt, weight in placement.rows:
                row_image[row] = image
                row_context[row] = prompt * (chunks // len(prompt))  # attention does not notice whole repetitions
                timestep[row] = step.timestep
                guidance[image, row] = weight
                guidance_embedded[row] = request.wish.guidance_scale - 1
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
            "level": level,
            **told,
        },
    )
