"""Errors as clients of AUTOMATIC1111's web UI read them."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from server.api import openapi
from server.requests.errors import STATUS, FieldError, InvalidRequest, ServerError

_NAMES = {  # of fields: ours, and what the web UI calls them
    "image": "init_images",
    "strength": "denoising_strength",
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "num_images": "batch_size",
    "scheduler": "sampler_name",
    "sigmas": "scheduler",
    "timestep_spacing": "scheduler",
    "decoder": "override_settings.sd_vae_decode_method",
    "clip_skip": "override_settings.CLIP_stop_at_last_layers",
}
_IN_TEXT = re.compile(r"\b(num_inference_steps|guidance_scale|num_images)\b")
_INTERRUPTED = 499


class InvalidField(BaseModel):
    """What is wrong with one field."""

    loc: list[str | int]
    msg: str
    type: str


class Error(BaseModel):
    """An error, as FastAPI has it: a list where fields are invalid, and otherwise a sentence."""

    detail: str | list[InvalidField]


def error_response(error: ServerError) -> Response:
    document = Error(detail=[_invalid(field) for field in error.fields] or error.detail)
    return JSONResponse(document.model_dump(), STATUS[type(error)])


def rejected(field: str, message: str) -> InvalidRequest:
    """The error of one field."""
    return InvalidRequest(f"{field}: {message}", fields=(FieldError(field, message),))


def in_its_words(error: InvalidRequest) -> InvalidRequest:
    """`error` with the web UI's names of fields."""
    fields = tuple(FieldError(_NAMES.get(one.field, one.field), _reword(one.message)) for one in error.fields)
    return type(error)(_reword(error.detail), fields=fields)


def responses() -> dict[int | str, dict[str, Any]]:
    """The error responses of a route that generates images, by status, for OpenAPI."""
    interrupted = {"model": Error, "description": "Interrupted before an image was complete."}
    return {**openapi.errors(Error), _INTERRUPTED: interrupted}


def _invalid(field: FieldError) -> InvalidField:
    return InvalidField(loc=["body", *field.field.split(".")], msg=field.message, type="value_error")


def _reword(text: str) -> str:
    return _IN_TEXT.sub(lambda name: _NAMES[name[0]], text)
