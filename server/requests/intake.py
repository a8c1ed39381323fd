"""Intake: a validated body becomes a `Request` with every default filled in, or is rejected with the reason."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import PIL.Image

from engines.contract import GUIDANCE_EMBEDDED, TIME_IDS, DecoderName
from engines.manifest import Manifest, Size
from engines.schedulers import Scheduler, Table, complete, find, table
from engines.step_cache import DEMO_DRIFT
from server.requests import uploads
from server.requests.context import ANONYMOUS, RequestContext
from server.requests.depths import Cache, StepCache
from server.requests.errors import FieldError, InvalidRequest
from server.requests.init_images import start_of
from server.requests.loras import Loras, choose, names_loras
from server.requests.params import GenerationParams, InitImage
from server.requests.request import Event, Request
from server.requests.schemas import MAX_SEED, SIZE_CONDITIONS, GenerateRequest
from server.requests.tokenizer import PromptTokenizer

Listener = Callable[[Request, Event], None]


class Intake:
    """Makes requests by the model's defaults and limits. Knows neither queues nor devices."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: PromptTokenizer,
        *,
        model: str = "",
        cache: StepCache = "off",
        loras: Loras | None = None,
    ) -> None:
        """`model` is the name of the model in this server.

        `cache` is the step cache of requests that do not set it; `disabled` refuses those that ask for one.
        Without `loras` none can be chosen, and their tags in prompts are text.
        """
        self._model = model
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._cache = cache
        self._loras = loras

    @property
    def loras(self) -> Loras | None:
        """The LoRAs that requests may choose; None: the server has none."""
        return self._loras

    def reads_files(self, body: GenerateRequest) -> bool:
        """Whether `request` may take long for this body: it decodes images, or reads the files of LoRAs."""
        return body.image is not None or (self._loras is not None and names_loras(body))

    def request(self, body: GenerateRequest, *listeners: Listener, context: RequestContext = ANONYMOUS) -> Request:
        """Fill in the defaults, tokenize, decode images, and compile the scheduler's table.

        Raises:
            InvalidRequest: the bundle was not built for this size, the scheduler does not support the step count, an
                image cannot be decoded, a LoRA is not there, or fields contradict each other.
            LoraUnreadable
        """
        _check_contradictions(body)
        if self._manifest.embeds_guidance and (body.guidance_start, body.guidance_end or 1) != (0, 1):
            raise _rejected(
                "guidance_end", "This model embeds its guidance scale: leave out guidance_start and guidance_end."
            )
        defaults = self._manifest.defaults
        seed = secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed
        steps = body.num_inference_steps or defaults.num_inference_steps
        guidance = defaults.guidance_scale if body.guidance_scale is None else body.guidance_scale
        image = None if body.image is None else uploads.read(body.image, field="image")
        size = self._size(body, image)
        init_image, masked = start_of(body, image, size, self._manifest)
        scheduler = self._scheduler(body, steps)
        cache = self._step_cache(body)
        params = GenerationParams(
            prompt=self._tokenizer(body.prompt, syntax=body.prompt_syntax, names_loras=self._loras is not None),
            negative_prompt=self._tokenizer(
                body.negative_prompt,
                syntax=body.prompt_syntax,
                zeros_if_empty=self._manifest.context.force_zeros_for_empty_prompt,
            ),
            size=size,
            scheduler=scheduler,
            num_inference_steps=steps,
            guidance_scale=guidance,
            guidance_start=body.guidance_start,
            guidance_end=body.guidance_end or self._guidance_end(cache),
            seeds=tuple((seed + index) % (MAX_SEED + 1) for index in range(body.num_images)),
            clip_skip=self._clip_skip(body),
            init_image=init_image,
            masked=masked,
            preview_every=body.preview_every,
            unet_inputs=self._unet_inputs(body, size, guidance),
            isolated=body.exact,
            cache=cache,
            full_steps=self._full_steps(body, steps),
            feature_drift=self._manifest.feature_drift or DEMO_DRIFT,
            decoder=self._decoder(body),
            loras=choose(body, self._loras, self._manifest),
            model=self._model,
            model_sha256=self._manifest.source.file_sha256,
        )
        return Request(
            params,
            self._table(scheduler, steps, init_image),
            listeners,
            context.request_id or uuid.uuid4().hex,
            context,
            priority=body.priority,
            deadline=_deadline(body, context),
        )

    def raise_cache(self, request: Request, cache: Cache) -> Request:
        """`request`, which has not been queued, with a higher `cache` and all that goes with it, and a warning.

        It sets no part of the dial itself.
        """
        guidance_end = self._guidance_end(cache)
        params = replace(request.params, cache=cache, guidance_end=guidance_end, raised_from=request.params.cache)
        return replace(request, params=params)

    def _unet_inputs(self, body: GenerateRequest, size: Size, guidance: float) -> dict[str, float | tuple[float, ...]]:
        """The inputs of the UNet that only some models have."""
        embedded = {GUIDANCE_EMBEDDED.name: guidance - 1} if self._manifest.embeds_guidance else {}
        return embedded | self._time_ids(body, size)

    def _time_ids(self, body: GenerateRequest, size: Size) -> dict[str, tuple[float, ...]]:
        given = {name: getattr(body, name) for name in SIZE_CONDITIONS}
        if self._manifest.has_size_conditions:
            own = (size.height, size.width)
            original, crop, target = given.values()
            return {TIME_IDS.name: (*(original or own), *(crop or (0, 0)), *(target or own))}
        if unknown := next((name for name, value in given.items() if value is not None), None):
            raise _rejected(unknown, f"This model has no {unknown}, as Stable Diffusion XL has: leave it out.")
        return {}

    def _size(self, body: GenerateRequest, image: PIL.Image.Image | None) -> Size:
        """What was asked for, or the built size nearest to the image's shape, or the model's default."""
        built = self._manifest.resolutions
        default = built[0]
        if image is not None and body.width is None and body.height is None:
            shape = image.width / image.height
            default = min(built, key=lambda size: (abs(size.width / size.height - shape), size != built[0]))
        size = Size(width=body.width or default.width, height=body.height or default.height)
        try:
            return built[built.index(size)]  # the same object for all: what is looked up by it is found faster
        except ValueError:
            message = f"Unsupported size {size}: this model was built for {', '.join(map(str, built))}."
            fields = (FieldError("width", message), FieldError("height", message))
            raise InvalidRequest(message, fields=fields) from None

    def _scheduler(self, body: GenerateRequest, steps: int) -> Scheduler:
        defaults = self._manifest.defaults
        try:
            asked = find(
                defaults.scheduler if body.scheduler is None else body.scheduler,
                sigmas=body.sigmas,
                timestep_spacing=body.timestep_spacing,
                final_sigmas_type=body.final_sigmas_type,
                eta=body.eta,
            )
        except ValueError as error:
            raise _rejected("scheduler", str(error)) from error
        return complete(asked, defaults, num_steps=steps)

    def _table(self, scheduler: Scheduler, steps: int, init_image: InitImage | None) -> Table:
        """The steps to be taken: with an original to start from, only the last of them."""
        taken = steps if init_image is None else min(int(steps * init_image.strength), steps)
        if taken < 1:
            raise _rejected(
                "strength",
                f"{steps} steps at this strength give no denoising step: increase num_inference_steps or strength.",
            )
        try:
            return table(scheduler, steps, self._manifest.noise_schedule, skip=steps - taken)
        except ValueError as error:
            raise _rejected("num_inference_steps", str(error)) from error

    @property
    def has_step_cache(self) -> bool:
        """Whether requests may ask for the step cache."""
        return self._cache != "disabled"

    def _step_cache(self, body: GenerateRequest) -> Cache:
        if self._cache != "disabled":
            return body.cache or self._cache
        if body.cache not in (None, "off"):
            raise _rejected("cache", "This server runs without the step cache: leave out cache, or set it to off.")
        return "off"

    def _guidance_end(self, cache: Cache) -> Literal["auto"] | float:
        """The part of the dial that `guidance_end` sets."""
        return "auto" if cache == "faster" and not self._manifest.embeds_guidance else 1.0

    def _full_steps(self, body: GenerateRequest, steps: int) -> int | None:
        asked = body.full_steps
        if asked is not None and asked > steps:
            raise _rejected("full_steps", f"There are {steps} denoising steps: compute 1 to {steps} of them in full.")
        if asked is not None and asked < steps and not self.has_step_cache:
            raise _rejected("full_steps", "This server runs without the step cache: leave out full_steps.")
        return asked

    def _decoder(self, body: GenerateRequest) -> DecoderName:
        if body.decoder == "fast" and not self._manifest.has_fast_decoder:
            raise _rejected(
                "decoder",
                "This model was built without a fast decoder: leave out decoder, or have it built with "
                "build_engines.py --decoder, such as madebyollin/taesd.",
            )
        return body.decoder

    def _clip_skip(self, body: GenerateRequest) -> int:
        layers = self._manifest.context.layers
        if body.clip_skip >= layers:
            raise _rejected("clip_skip", f"This model's text encoder has {layers} layers: skip at most {layers - 1}.")
        return body.clip_skip


def _deadline(body: GenerateRequest, context: RequestContext) -> float | None:
    """When the shorter of both time limits ends, counted from the arrival of the headers."""
    timeouts = [seconds for seconds in (context.timeout, body.timeout_s) if seconds is not None]
    if not timeouts:
        return None
    arrived = time.perf_counter() if context.arrived is None else context.arrived
    return arrived + min(timeouts)


def _check_contradictions(body: GenerateRequest) -> None:
    if body.guidance_rescale:
        raise _rejected(
            "guidance_rescale",
            "guidance_rescale is not supported: it is not linear in the model's output, which batched steps require. "
            "Lower guidance_scale, or end guidance early with guidance_end.",
        )
    if isinstance(body.guidance_end, float) and body.guidance_start >= body.guidance_end:
        raise _rejected("guidance_end", "guidance_end must be greater than guidance_start; 0 and 1 are the defaults.")
    if body.image is None and (body.mask is not None or body.strength is not None):
        field = "strength" if body.mask is None else "mask"
        raise _rejected(field, f"{field} requires an initial image: send image too.")
    if body.exact and body.num_images > 1:
        raise _rejected("exact", "exact supports one image per request: send one request per seed.")


def _rejected(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, fields=(FieldError(field, message),))
