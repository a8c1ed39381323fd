"""A request: its parameters, its progress, and its one outcome."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from engines.contract import LANES
from engines.manifest import Size
from engines.schedulers import METHODS, Table
from engines.step_cache import full_steps
from server.requests.context import ANONYMOUS, Priority, RequestContext
from server.requests.depths import Depth, depths_of, full_count
from server.requests.errors import Cancelled, DeadlineExceeded, ServerError
from server.requests.params import GenerationParams, Image

_log = logging.getLogger(__name__)

Stage = Literal["queue", "encode", "denoise", "decode"]

_WEIGHTS: dict[Priority, float] = {"interactive": 1.0, "batch": 1 / 8}
_LAG = 2  # steps after which guidance ends at the earliest: one may be in flight when another one is completed
_AGREED = 0.3  # of latents, whose deviation is about 1: what guidance may still add where it ends by itself


class BatchKey(NamedTuple):
    """What requests must share to share a step: the model and the image size."""

    model: str
    size: Size


@dataclass(frozen=True, slots=True)
class Started:
    """Event: the request has left the queue and takes steps."""


class Stepped(NamedTuple):
    """Event: one more denoising step is done."""

    step: int
    steps: int
    previews: tuple[Image, ...] = ()  # one per image, where they were asked for


@dataclass(frozen=True, slots=True)
class Completed:
    """Outcome: the images, one per seed."""

    images: tuple[Image, ...]
    flagged: tuple[bool, ...] | None = None  # of each image, whether the safety checker flagged it; None: not checked


@dataclass(frozen=True, slots=True)
class Failed:
    """Outcome: no images, and the reason."""

    error: ServerError


Outcome = Completed | Failed
Event = Started | Stepped | Outcome


class Flow(NamedTuple):
    """What the device is shared between: the requests that a caller sends at one priority."""

    caller: str
    priority: Priority

    @property
    def weight(self) -> float:
        """The share of the device, relative to those of other flows."""
        return _WEIGHTS[self.priority]


@dataclass(eq=False)
class Request:
    """The parameters of one call, its progress, and its one outcome.

    The pipeline calls `advance`, the executor `finish_stage`; `cancel` and `finish` are for any thread.
    """

    params: GenerationParams
    table: Table
    listeners: tuple[Callable[[Request, Event], None], ...]
    id: str
    context: RequestContext = ANONYMOUS
    priority: Priority = "interactive"
    deadline: float | None = None  # on perf_counter's clock
    timings: dict[Stage, float] = field(default_factory=dict)  # seconds

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled: ServerError | None = None  # set once, so any thread may read it and write it
        self._mark = time.perf_counter()
        self._step = 0
        self.outcome: Outcome | None = None

    @property
    def step(self) -> int:
        """UNet calls launched so far."""
        return self._step

    def advance(self) -> int:
        """Count one more UNet call, and return how many there are now."""
        self._step += 1
        return self._step

    @cached_property
    def batch_key(self) -> BatchKey:
        """What others must share with it to share its steps."""
        return BatchKey(self.params.model, self.params.size)

    @cached_property
    def ranks(self) -> int:
        """The ranks of LoRAs that update each of its rows."""
        return sum(weighted.lora.ranks for weighted in self.params.loras)

    @cached_property
    def images(self) -> int:
        """The number of images."""
        return len(self.params.seeds)

    @property
    def rows(self) -> int:
        """The most UNet rows that a step takes from now on: two for a guided image, one for an unguided one."""
        step = min(self._step, self.steps - 1)
        if step > self._last_guided:
            return self.images
        if not self.params.ends_guidance:
            return 2 * self.images
        return self.images + sum([step < until for until in self._guided_until])

    @cached_property
    def chunks(self) -> int:
        """The prompt chunks whose embeddings it holds on the device."""
        params = self.params
        return len(params.prompt.chunks) + (len(params.negative_prompt.chunks) if params.guided else 0)

    # Every step asks for these of every request that takes it, so they are computed once for all steps.

    @cached_property
    def guided(self) -> tuple[bool, ...]:
        """For each step, whether guidance applies."""
        params, steps = self.params, self.steps
        begin, end = params.guidance_start, 1.0 if params.guidance_end == "auto" else params.guidance_end
        return tuple(params.guided and begin <= step / steps < end for step in range(steps))

    @cached_property
    def _last_guided(self) -> int:
        """The last step to which guidance applies, as far as is known from the start; -1: there is none."""
        return max((step for step, guided in enumerate(self.guided) if guided), default=-1)

    @cached_property
    def _guided_until(self) -> list[int]:
        """For each image, the step from which on guidance has ended by itself."""
        return [self.steps] * self.images

    def is_guided(self, image: int) -> bool:
        """Whether guidance applies to an image in the next step."""
        return self.guided[self._step] and self._step < self._guided_until[image]

    def will_be_guided(self, image: int) -> bool:
        """Whether guidance applies to an image in any step from now on, as far as is known."""
        return self._step <= self._last_guided and self._step < self._guided_until[image]

    def observe_guidance(self, step: int, effects: Sequence[float]) -> None:
        """End guidance for images to which it makes no difference any more, where the request asks for that.

        It ends a fixed number of steps after `step`, whether others are in flight or not, so batching changes no image.

        Args:
            step: the number of a completed step, from 0; the request is at most two steps ahead.
            effects: by image, the root mean square of what guidance adds to the model's output in that step.
        """
        if not self.params.ends_guidance or not self.guided[step]:
            return
        to_image = abs(float(self.table.steps[step].matrix[LANES - 1, 1]))  # from the model's output to the x0 estimate
        for image, effect in enumerate(effects):
            if effect * to_image < _AGREED:
                self._guided_until[image] = min(self._guided_until[image], step + _LAG)

    @cached_property
    def depths(self) -> tuple[Depth, ...]:
        """The depth of each step. It depends on the request alone, so batching changes no image."""
        return depths_of(self.guided, self._full_steps)

    @property
    def _full_steps(self) -> frozenset[int]:
        """The steps that its cache computes in full."""
        params = self.params
        if not params.reuses_features:
            return frozenset(range(self.steps))
        if params.full_steps is None:
            count = full_count(params.cache, self.table, METHODS[params.scheduler.method])
        else:  # of them all: as large a share of the calls that it makes
            count = round(params.full_steps * self.steps / params.num_inference_steps)
        return frozenset(full_steps(self.table, max(1, min(count, self.steps)), params.feature_drift))

    @property
    def depth(self) -> Depth:
        """The depth of the next step."""
        return self.depths[self._step]

    @property
    def steps_left(self) -> Counter[Depth]:
        """How many steps of each depth remain."""
        return Counter(self.depths[self._step :])

    @cached_property
    def steps(self) -> int:
        """UNet calls in all; some schedulers make more of them than `num_inference_steps`."""
        return len(self.table.steps)

    @cached_property
    def work(self) -> int:
        """UNet rows times steps."""
        return self.rows * self.steps

    @property
    def work_left(self) -> int:
        """UNet rows times the steps that remain."""
        return self.rows * (self.steps - self._step)

    @property
    def denoised(self) -> bool:
        """Whether the last step is launched."""
        return self._step == self.steps

    @property
    def caller(self) -> str:
        """Whom the queue is fair to."""
        return self.context.caller.name

    @cached_property
    def flow(self) -> Flow:
        """What the queue is fair between."""
        return Flow(self.caller, self.priority)

    @property
    def cancelled(self) -> ServerError | None:
        """Why no more steps are wanted; None while they are."""
        if self._cancelled is None and self.deadline is not None and time.perf_counter() >= self.deadline:
            self.cancel(DeadlineExceeded("The time limit of this request passed before its image was done."))
        return self._cancelled

    def cancel(self, reason: ServerError | None = None) -> None:
        """Ask for no more steps; the outcome, which is `reason`, follows when its rows are free."""
        if self._cancelled is None:
            self._cancelled = reason or Cancelled("The request was cancelled before its image was done.")

    def finish_stage(self, stage: Stage) -> None:
        """Add the time since the last stage ended to `stage`."""
        now = time.perf_counter()
        self.timings[stage] = self.timings.get(stage, 0.0) + now - self._mark
        self._mark = now

    def notify(self, event: Event) -> None:
        """Call every listener with `event`. One that fails is logged: neither the others nor the request suffer."""
        for listener in self.listeners:
            try:
                listener(self, event)
            except Exception:
                fields = {"request_id": self.id}
                _log.exception("a listener of request %s failed", self.id, extra={"fields": fields})

    def finish(self, outcome: Outcome) -> None:
        """Give the request its outcome. The first call counts, later ones change nothing."""
        with self._lock:
            if self.outcome is not None:
                return
            self.outcome = outcome
        self.notify(outcome)
