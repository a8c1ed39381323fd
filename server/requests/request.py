"""A request: the parameters of one call, its progress, and its one outcome."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from engines.contract import GUIDANCE_EMBEDDED, LANES, TIME_IDS, DecoderName
from engines.manifest import FeatureDrift, Size
from engines.schedulers import Scheduler, Table
from engines.step_cache import DEMO_DRIFT, full_steps
from server.requests.context import ANONYMOUS, Priority, RequestContext
from server.requests.errors import Cancelled, DeadlineExceeded, ServerError
from server.requests.tokenizer import Prompt

_log = logging.getLogger(__name__)

Image = NDArray[np.uint8]  # [H, W, 3], RGB
Mask = NDArray[np.float32]  # [h, w], of latents: 1 where an image is repainted, 0 where it is kept
PixelMask = NDArray[np.uint8]  # [H, W], likewise
Stage = Literal["queue", "encode", "denoise", "decode"]
Cache = Literal["off", "fast", "faster"]  # the dial: each position computes less than the one before
StepCache = Literal[Cache, "disabled"]  # of a server: the default of requests, or that there is none
Depth = Literal["full", "shallow"]  # how much of the UNet a step computes
DEPTHS: tuple[Depth, ...] = get_args(Depth)

_WEIGHTS: dict[Priority, float] = {"interactive": 1.0, "batch": 1 / 8}
_NEGATIVE_IS_UNUSED = "It is not used without guidance: send a guidance_scale above 1 if the model is made for it."
_RAISED = "The server was under load and set it to {}, not {}, which changes images slightly: send cache to choose it."
_FEW_STEPS = 4  # all full, and so many at least: fewer steps would spare the others too, with the same loss
_LARGE_STEPS = 10  # as far apart as those of so many, of which half are full
_LAG = 2  # steps after which guidance ends at the earliest: one may be in flight when another one is completed
_AGREED = 0.3  # of latents, whose deviation is about 1: what guidance may still add where it ends by itself
# Steps that are full: one of so many, and so many more. Fresh noise at each step changes features more.
_FULL: dict[Cache, tuple[int, int]] = {"off": (1, 0), "fast": (4, 1), "faster": (5, 1)}
_FULL_WITH_NOISE: dict[Cache, tuple[int, int]] = {"off": (1, 0), "fast": (3, 0), "faster": (4, 1)}


@dataclass(frozen=True, slots=True, eq=False)
class InitImage:
    """The image to start from. With a mask only a part of it is repainted."""

    image: Image
    strength: float  # the share of the steps that are taken; 1 keeps next to nothing of the image
    mask: Mask | None = None
    warnings: tuple[str, ...] = ()  # sentences, each after the name of its field

    @property
    def starts_from_noise(self) -> bool:
        """Whether the image is ignored, as diffusers does for inpainting at full strength, and only there."""
        return self.mask is not None and self.strength == 1


@dataclass(frozen=True, slots=True, eq=False)
class MaskedImage:
    """What a UNet that inpaints sees besides the latents: the image without what is to be repainted, and where that is.

    Without an image, or without a mask, everything is to be repainted.
    """

    image: Image
    pixels: PixelMask
    mask: Mask  # the first of each latent's pixels


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """A LoRA that requests may choose, as the device's pool holds it."""

    name: str
    sha256: str  # of its file: the same contents take the same place in the pool
    values: NDArray[np.float16]  # [ranks, G], every scale of the file included
    updates_unet: bool
    updates_text_encoder: bool  # otherwise prompts are encoded as without it
    tensors_sha256: str = ""  # of the file without its header: what AUTOMATIC1111's web UI and Civitai know it by

    @property
    def ranks(self) -> int:
        """How many updates of rank one it is."""
        return len(self.values)


class WeightedLora(NamedTuple):
    """A LoRA of a request, and how strongly it applies."""

    lora: Lora
    weight: float


class BatchKey(NamedTuple):
    """What requests must share to share a step: the model and the image size."""

    model: str
    size: Size


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """Everything that decides the images, with every default filled in."""

    prompt: Prompt
    negative_prompt: Prompt
    size: Size
    scheduler: Scheduler
    num_inference_steps: int
    guidance_scale: float
    seeds: tuple[int, ...]  # one per image
    guidance_start: float = 0.0  # the share of the steps after which guidance begins
    guidance_end: float | Literal["auto"] = 1.0  # and ends; auto: once it hardly changes an image any more
    clip_skip: int = 0  # layers skipped at the end of the text encoder
    init_image: InitImage | None = None
    masked: MaskedImage | None = None  # of models that inpaint, whether there is an initial image or not
    preview_every: int = 0  # steps; 0 shows none
    # Inputs of the UNet besides those of every model, the same for each row: by port, a number or numbers of a row.
    unet_inputs: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)
    isolated: bool = False  # shares no step, so that batching cannot change a bit
    cache: Cache = "off"  # fast, faster: most steps reuse the UNet's deep features of an earlier step
    raised_from: Cache | None = None  # the `cache` that it would have without load, if the server raised it
    full_steps: int | None = None  # of num_inference_steps; None: as many as the cache says
    feature_drift: FeatureDrift = DEMO_DRIFT  # of the model, by which full steps are placed
    decoder: DecoderName = "vae"  # fast: the one distilled from the VAE
    loras: tuple[WeightedLora, ...] = ()  # each once
    model: str = ""  # its name in this server
    model_sha256: str | None = None  # of the single file that it was built from, if it was

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance applies, as in diffusers: not at a scale of 1 or less."""
        return self.guidance_scale > 1 and GUIDANCE_EMBEDDED.name not in self.unet_inputs

    @property
    def ends_guidance(self) -> bool:
        """Whether guidance ends by itself, for each image of its own."""
        return self.guidance_end == "auto" and self.guided

    @property
    def original_size(self) -> tuple[int, int] | None:
        """Height and width before scaling, a condition of the UNet; None: it has none."""
        return self._time_ids(0)

    @property
    def crops_coords_top_left(self) -> tuple[int, int] | None:
        return self._time_ids(2)

    @property
    def target_size(self) -> tuple[int, int] | None:
        """Height and width after scaling, a condition of the UNet."""
        return self._time_ids(4)

    def _time_ids(self, first: int) -> tuple[int, int] | None:
        values = self.unet_inputs.get(TIME_IDS.name)
        return (int(values[first]), int(values[first + 1])) if isinstance(values, tuple) else None

    @property
    def reuses_features(self) -> bool:
        """Whether steps are shallow: the UNet's features say little of the next of few steps."""
        if self.full_steps is not None:
            return self.full_steps < self.num_inference_steps
        return self.cache != "off" and self.num_inference_steps > _FEW_STEPS

    @property
    def warnings(self) -> list[str]:
        """How the images deviate from the request: sentences, each after the name of its field."""
        prompts = {"prompt": self.prompt, "negative_prompt": self.negative_prompt}
        found = [f"{field}: {warning}" for field, prompt in prompts.items() for warning in prompt.warnings]
        if self.negative_prompt.text and not self.guided:
            found.append(f"negative_prompt: {_NEGATIVE_IS_UNUSED}")
        if self.raised_from is not None:
            found.append(f"cache: {_RAISED.format(self.cache, self.raised_from)}")
        return found + list(self.init_image.warnings if self.init_image else ())


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
        chosen, found, known = self._full_steps, list[Depth](), False
        for step, guided in enumerate(self.guided):
            is_full = step in chosen or (guided and not known)  # features of every row
            known = guided if is_full else known
            found.append("full" if is_full else "shallow")
        return tuple(found)

    @property
    def _full_steps(self) -> frozenset[int]:
        """The steps that its cache computes in full."""
        if not self.params.reuses_features:
            return frozenset(range(self.steps))
        count = max(1, min(self._full_count, self.steps))
        return frozenset(full_steps(self.table, count, self.params.feature_drift))

    @property
    def _full_count(self) -> int:
        params = self.params
        if params.full_steps is not None:  # of them all: as large a share of the calls that it makes
            return round(params.full_steps * self.steps / params.num_inference_steps)
        part, more = (_FULL_WITH_NOISE if self.table.draws else _FULL)[params.cache]
        return max(math.ceil(self.steps / part) + more, math.ceil(min(self.steps, _LARGE_STEPS) / 2), _FEW_STEPS)

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
