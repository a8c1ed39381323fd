"""Errors as clients of AUTOMATIC1111's web UI read them."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse, Response

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
    "clip_skip": "override_settings.CLIP_stop_at_last_layers",
}
_IN_TEXT = re.compile(r"\b(num_inference_steps|guidance_scale|num_images)\b")
_ITEM = {
    "type": "object",
    "required": ["loc", "msg", "type"],
    "properties": {
        "loc": {"type": "array", "items": {"type": ["string", "integer"]}},
        "msg": {"type": "string"},
        "type": {"type": "string"},
    },
}
_SCHEMA = {
    "type": "object",
    "required": ["detail"],
    "properties": {"detail": {"anyOf": [{"type": "string"}, {"type": "array", "items": _ITEM}]}},
}
_EXAMPLE = {
    "detail": [{"loc": ["body", "steps"], "msg": "Input should be less than or equal to 200", "type": "value_error"}]
}
_SECONDS = {"description": "seconds after which to try again", "schema": {"type": "integer", "minimum": 1}}


def error_response(error: ServerError) -> Response:
    """`{"detail": …}`, as FastAPI has it: a list where fields are invalid, and otherwise a sentence."""
    detail = [_item(field) for field in error.fields] or error.detail
    return JSONResponse({"detail": detail}, STATUS[type(error)])


def rejected(field: str, message: str) -> InvalidRequest:
    """The error of one field."""
    return InvalidRequest(f"{field}: {message}", fields=(FieldError(field, message),))


def in_its_words(error: InvalidRequest) -> InvalidRequest:
    """`error` with the web UI's names of fields."""
    fields = tuple(FieldError(_NAMES.get(one.field, one.field), _reword(one.message)) for one in error.fields)
    return InvalidRequest(_reword(error.detail), fields=fields)


def responses() -> dict[int | str, dict[str, Any]]:
    """The error responses of a route that generates images, by status, for OpenAPI."""
    return {status: _response(status) for status in sorted({*STATUS.values()})}


def _item(field: FieldError) -> dict[str, Any]:
    return {"loc": ["body", *field.field.split(".")], "msg": field.message, "type": "value_error"}


def _reword(text: str) -> str:
    return _IN_TEXT.sub(lambda name: _NAMES[name[0]], text)


def _response(status: int) -> dict[str, Any]:
    known = {one.value: one.phrase for one in HTTPStatus}
    example = _EXAMPLE if status == HTTPStatus.UNPROCESSABLE_ENTITY else {"detail": known.get(status, "Interrupted")}
    response: dict[str, Any] = {
        "description": known.get(status, "Interrupted, before an image was complete"),
        "content": {"application/json": {"schema": _SCHEMA, "example": example}},
    }
    return response | ({"headers": {"Retry-After": _SECONDS}} if status in (429, 503) else {})
