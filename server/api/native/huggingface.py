"""Hugging Face's text-to-image and image-to-image on `POST /generate`: `inputs` and `parameters`, for an image file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from fastapi import Request as HttpRequest
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from server.api.body_limits import Lease
from server.api.error_responses import use_shape
from server.api.problems import explain, shorten
from server.requests.errors import STATUS, FieldError, InvalidRequest, ServerError
from server.requests.images import ImageFormat
from server.requests.schemas import GenerateRequest

_ERROR = {
    "type": "object",
    "description": "to bodies with inputs",
    "properties": {"error": {"type": "string"}},
    "required": ["error"],
}


class HuggingFaceBody(BaseModel):
    """A body of Hugging Face's clients, before its values are validated."""

    model_config = ConfigDict(extra="allow")

    inputs: Any
    parameters: Any = None


async def native(http: HttpRequest, body: HuggingFaceBody, lease: Lease) -> GenerateRequest:
    """The same request to `/generate`, whose errors from here on have Hugging Face's form. Raises InvalidRequest.

    With `parameters.prompt`, `inputs` is the image to start from. `parameters.target_size` is then the size if it is an
    object, and the field of that name if it is a list.
    """
    use_shape(http, error_response)
    async with lease.limits.parsers:  # an image may be megabytes of base64
        return await run_in_threadpool(_validate, body)


def image_format(wanted: str, body: GenerateRequest) -> ImageFormat:
    """The format of the answer, which is always an image file: as `Accept` names it, or as the body does."""
    return next((known for known in get_args(ImageFormat) if known == wanted), body.image_format)


def error_response(error: ServerError) -> Response:
    """`{"error": …}`."""
    return JSONResponse({"error": error.detail}, STATUS[type(error)])


def describe_body(described: Mapping[str, Any]) -> dict[str, Any]:
    """The OpenAPI description of the bodies of `/generate`, with those that are read here."""
    content = described["content"]
    native_schema = content["application/json"]["schema"]
    schema = {"title": "Body", "anyOf": [native_schema, _schema(native_schema)]}
    return {**described, "content": {**content, "application/json": {"schema": schema}}}


def describe_errors(problems: Mapping[int | str, Mapping[str, Any]]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI descriptions of errors, with the form that they have here."""
    own = {"application/json": {"schema": _ERROR}}
    return {status: {**problem, "content": {**problem["content"], **own}} for status, problem in problems.items()}


def _schema(native_schema: Mapping[str, Any]) -> dict[str, Any]:
    fields = native_schema["properties"]
    parameters = {
        "type": "object",
        "properties": {name: schema for name, schema in fields.items() if name != "prompt"},
        "additionalProperties": False,
    }
    return {
        "title": "HuggingFaceBody",
        "description": "As Hugging Face's clients send it; the answer is an image file.",
        "type": "object",
        "properties": {"inputs": fields["prompt"], "parameters": {"anyOf": [parameters, {"type": "null"}]}},
        "required": ["inputs"],
        "additionalProperties": False,
    }


def _validate(body: HuggingFaceBody) -> GenerateRequest:
    try:
        return GenerateRequest.model_validate(_fields(body))
    except ValidationError as error:
        raise explain(error) from None


def _fields(body: HuggingFaceBody) -> dict[str, Any]:
    """The fields of `/generate`."""
    if unknown := next(iter(body.model_extra or ()), None):
        raise _refuse(unknown, "Unknown field: send inputs and parameters only.")
    parameters = _object("parameters", body.parameters)
    if "prompt" not in parameters:
        return {"prompt": body.inputs, **parameters}
    size = parameters.pop("target_size", None)
    sides = {"target_size": size} if isinstance(size, list) else _object("target_size", size)
    return {"image": body.inputs, **parameters, **sides}


def _object(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise _refuse(name, "Input should be an object.")
    return dict(value or {})


def _refuse(name: str, message: str) -> InvalidRequest:
    field = shorten(name)
    return InvalidRequest(f"{field}: {message}", fields=(FieldError(field, message),))
