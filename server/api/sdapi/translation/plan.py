"""From a body of txt2img or img2img to the requests that it stands for."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engines.manifest import Manifest
from server.api.sdapi.errors import rejected
from server.api.sdapi.translation import neutral
from server.api.sdapi.translation.samplers import sampling
from server.api.sdapi.translation.schemas import MAX_IMAGES, Txt2Img
from server.requests.schemas import MAX_SEED, GenerateRequest

PREVIEW_EVERY = 2  # steps, for GET progress
_MOST_LAYERS = 64
_DECODERS = {"Full": "vae", "TAESD": "fast"}


@dataclass(frozen=True, slots=True)
class Plan:
    """The requests that one body stands for, one after the other, without the files of img2img."""

    bodies: tuple[GenerateRequest, ...]
    seed: int
    batch_size: int
    warnings: tuple[str, ...]
    parameters: dict[str, Any]  # the body, as the reply repeats it

    @property
    def images(self) -> int:
        return sum(body.num_images for body in self.bodies)


def plan(body: Txt2Img, manifest: Manifest, *, model: str) -> Plan:
    """Translate `body`, for the model of that name. Raises InvalidRequest, naming the field."""
    settings = body.override_settings or {}
    warnings = neutral.check(body.model_extra or {}, settings)
    sampled = sampling(body.sampler_name or body.sampler_index, body.scheduler, body.eta)
    common = _common(body) | sampled.fields | {"model": model}
    seed = secrets.randbelow(MAX_SEED + 1) if body.seed is None or body.seed == -1 else body.seed
    bodies = tuple(
        GenerateRequest.model_validate({**common, "seed": (seed + first) % (MAX_SEED + 1), "num_images": count})
        for first, count in _batches(body, _images_per_request(body, manifest))
    )
    return Plan(bodies, seed, body.batch_size or 1, (*warnings, *sampled.warnings), _parameters(body, seed))


def _common(body: Txt2Img) -> dict[str, Any]:
    """The fields that all requests of a call share, without those of the sampler."""
    settings = body.override_settings or {}
    return {
        "prompt": body.prompt or "",
        "negative_prompt": body.negative_prompt or "",
        "width": body.width,
        "height": body.height,
        "num_inference_steps": body.steps,
        "guidance_scale": body.cfg_scale,
        "clip_skip": _clip_skip(settings.get("CLIP_stop_at_last_layers")),
        "cache": body.cache,
        "decoder": _decoder(settings.get("sd_vae_decode_method")),
        "preview_every": PREVIEW_EVERY,
    }


def _batches(body: Txt2Img, most: int) -> Iterator[tuple[int, int]]:
    """The first image and the number of images of each request: a batch of more than `most` takes several."""
    batch_size, n_iter = body.batch_size or 1, body.n_iter or 1
    if batch_size * n_iter > MAX_IMAGES:
        raise rejected("n_iter", f"{batch_size * n_iter} images: ask for at most {MAX_IMAGES} in all.")
    for start in range(0, batch_size * n_iter, batch_size):
        for first in range(start, start + batch_size, most):
            yield first, min(most, start + batch_size - first)


def _images_per_request(body: Txt2Img, manifest: Manifest) -> int:
    """The most images whose rows fit in one request."""
    scale = manifest.defaults.guidance_scale if body.cfg_scale is None else body.cfg_scale
    guided = scale > 1 and not manifest.embeds_guidance
    return max(manifest.max_rows // (2 if guided else 1), 1)


def _clip_skip(stop_at: object) -> int:
    """Layers to skip. The web UI counts from the end, beginning with 1."""
    if stop_at is None:
        return 0
    if type(stop_at) is not int or not 0 <= stop_at <= _MOST_LAYERS:
        raise rejected(
            "override_settings.CLIP_stop_at_last_layers", f"Input should be a whole number from 1 to {_MOST_LAYERS}"
        )
    return max(stop_at - 1, 0)


def _decoder(method: object) -> str:
    if method is None:
        return "vae"
    if not isinstance(method, str) or method not in _DECODERS:
        raise rejected("override_settings.sd_vae_decode_method", f"Input should be {' or '.join(_DECODERS)}")
    return _DECODERS[method]


def _parameters(body: Txt2Img, seed: int) -> dict[str, Any]:
    settings = {
        name: value for name, value in (body.override_settings or {}).items() if name in neutral.HONOURED_SETTINGS
    }
    known = body.model_dump(mode="json", include=set(type(body).model_fields) - {"init_images", "mask"})
    return {**known, "seed": seed, "override_settings": settings}
