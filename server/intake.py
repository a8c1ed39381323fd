"""The way in: what a caller wrote becomes a `Request` with every default filled in, or is refused with the reason."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable

from engines.manifest import Manifest, Size
from server.errors import FieldError, InvalidRequest
from server.request import Event, Request, Wish
from server.schedulers import table
from server.schemas import MAX_SEED, GenerateRequest
from server.tokenizer import Tokenizer

Listener = Callable[[Request, Event], None]


class Intake:
    """Knows the model's defaults and limits, and nothing of queues or devices."""

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer) -> None:
        self._manifest = manifest
        self._tokenizer = tokenizer

    def request(self, body: GenerateRequest, *listeners: Listener, request_id: str | None = None) -> Request:
        """Fill in the defaults, tokenize, and compile the scheduler's table.

        Raises:
            InvalidRequest: the model was not built for this size, or the scheduler cannot make so many steps.
        """
        defaults = self._manifest.defaults
        seed = secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed
        wish = Wish(
            prompt=self._tokenizer(body.prompt),
            negative_prompt=self._tokenizer(body.negative_prompt),
            size=self._size(body),
            scheduler=body.scheduler or defaults.scheduler,
            num_inference_steps=body.num_inference_steps or defaults.num_inference_steps,
            guidance_scale=defaults.guidance_scale if body.guidance_scale is None else body.guidance_scale,
            seeds=tuple((seed + index) % (MAX_SEED + 1) for index in range(body.num_images)),
            preview_every=body.preview_every,
            embeds_guidance=self._manifest.embeds_guidance,
        )
        try:
            steps = table(wish.scheduler, wish.num_inference_steps, self._manifest.noise_schedule)
        except ValueError as error:
            raise InvalidRequest(str(error), fields=(FieldError("num_inference_steps", str(error)),)) from error
        return Request(wish, steps, listeners, request_id or uuid.uuid4().hex)

    def _size(self, body: GenerateRequest) -> Size:
        default = self._manifest.resolutions[0]
        size = Size(width=body.width or default.width, height=body.height or default.height)
        if size not in self._manifest.resolutions:
            built = ", ".join(map(str, self._manifest.resolutions))
            message = f"This model was built for {built}, not for {size}: ask for one of those."
            raise InvalidRequest(message, fields=(FieldError("width", message), FieldError("height", message)))
        return size
