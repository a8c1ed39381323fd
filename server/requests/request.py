"""A request: one caller's wish, its progress, and its one ending."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Size
from engines.schedulers import Scheduler, Table
from server.requests.errors import ServerError
from server.requests.tokenizer import Prompt

Image = NDArray[np.uint8]  # [H, W, 3], RGB
Mask = NDArray[np.float32]  # [h, w], of latents: 1 where a picture is drawn anew, 0 where it stays
Stage = Literal["queue", "encode", "denoise", "decode"]
Cache = Literal["off", "fast"]
Depth = Literal["full", "shallow"]  # how much of the UNet a step computes
DEPTHS: tuple[Depth, ...] = get_args(Depth)

_FULL_EVERY = 3  # steps with the fast cache: a full one, and two that take its features


@dataclass(frozen=True, slots=True, eq=False)
class InitImage:
    """The picture to start from. With a mask only a part of it is drawn anew."""

    image: Image
    strength: float  # how much of the way is gone again; 1 keeps next to nothing
    mask: Mask | None = None

    @property
    def starts_from_noise(self) -> bool:
        """Inpainting at full strength, which in diffusers forgets the picture; image to image never quite does."""
        return self.mask is not None and self.strength == 1


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """What a caller asked for, with every default filled in."""

    prompt: Prompt
    negative_prompt: Prompt
    size: Size
    scheduler: Scheduler
    num_inference_steps: int
    guidance_scale: float
    seeds: tuple[int, ...]  # one per image
    guidance_start: float = 0.0  # of the way: the share of the steps after which guidance begins
    guidance_end: float = 1.0  # and ends
    clip_skip: int = 0  # layers of the text encoder left out at its end
    init_image: InitImage | None = None
    preview_every: int = 0  # steps; 0 shows none
    embeds_guidance: bool = False  # the model is told its guidance, and the negative prompt has no say
    exact: bool = False  # steps are shared with nobody, so that company cannot change a bit
    cache: Cache = "off"  # fast: most steps take deep features of the UNet from a step before

    @property
    def guided(self) -> bool:
        """Classifier-free guidance, as diffusers decides it: at a scale of 1 or less the negative prompt has no say."""
        return self.guidance_scale > 1 and not self.embeds_guidance


@dataclass(frozen=True, slots=True)
class Started:
    """The request left the queue."""


class Stepped(NamedTuple):
    """One more denoising step is done."""

    step: int
    steps: int
    preview: Image | None = None


@dataclass(frozen=True, slots=True)
class Completed:
    """Ending: the pictures, one per seed."""

    images: tuple[Image, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """Ending: no picture, and why."""

    error: ServerError


Outcome = Completed | Failed
Event = Started | Stepped | Outcome


@dataclass(eq=False)
class Request:
    """One caller's wish and its progress. `step` and `timings` belong to the executor, `cancel` to anyone."""

    params: GenerationParams
    table: Table
    listeners: tuple[Callable[[Request, Event], None], ...]
    id: str
    step: int = 0  # UNet calls done
    timings: dict[Stage, float] = field(default_factory=dict)  # seconds

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False  # only ever becomes True, so any thread may read it and write it
        self._mark = time.perf_counter()
        self.outcome: Outcome | None = None

    @cached_property
    def images(self) -> int:
        return len(self.params.seeds)

    @cached_property
    def rows(self) -> int:
        """UNet rows that a step may take: a guided image takes two, an unguided one takes one."""
        return self.images * (2 if self.params.guided else 1)

    # Each step asks for these of everyone who takes it, so they are worked out once for all steps.

    @cached_property
    def guided(self) -> tuple[bool, ...]:
        """Of each step, whether the negative prompt has a say in it."""
        params, steps = self.params, self.steps
        return tuple(
            params.guided and params.guidance_start <= step / steps < params.guidance_end for step in range(steps)
        )

    @cached_property
    def depths(self) -> tuple[Depth, ...]:
        """Of each step. They hang on nothing but the request: company changes no picture."""
        return tuple(map(self._depth_at, range(self.steps)))

    def _depth_at(self, step: int) -> Depth:
        since = step % _FULL_EVERY if self.params.cache == "fast" else 0
        known = self.guided[step - since] or not self.guided[step]  # features of every row
        return "shallow" if since and known else "full"

    @property
    def depth(self) -> Depth:
        """Of the next step."""
        return self.depths[self.step]

    @property
    def left(self) -> Counter[Depth]:
        """How many steps of each depth are still to be done."""
        return Counter(self.depths[self.step :])

    @cached_property
    def steps(self) -> int:
        """UNet calls in all; some schedulers make more of them than steps."""
        return len(self.table.steps)

    @property
    def denoised(self) -> bool:
        return self.step == self.steps

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """Ask that no more steps be spent; the ending follows when its rows are free."""
        self._cancelled = True

    def finish_stage(self, stage: Stage) -> None:
        """Book the time since the last stage ended to `stage`."""
        now = time.perf_counter()
        self.timings[stage] = self.timings.get(stage, 0.0) + now - self._mark
        self._mark = now

    def notify(self, event: Event) -> None:
        for listener in self.listeners:
            listener(self, event)

    def end(self, outcome: Outcome) -> None:
        """Give the request its ending. The first call counts, later ones change nothing."""
        with self._lock:
            if self.outcome is not None:
                return
            self.outcome = outcome
        self.notify(outcome)
