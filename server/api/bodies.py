"""Read request bodies; shared by every API."""

from __future__ import annotations

import binascii
from functools import partial
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from server.api.forms import read_form
from server.api.problems import explain, shorten
from server.middleware.cross_origin import TRUSTED
from server.requests.errors import (
    BodyTooLarge,
    Cancelled,
    FieldError,
    ForeignOrigin,
    InvalidRequest,
    UnsupportedMediaType,
)

MAX_BODY = 34 * 1024 * 1024  # bytes: two files of 12 MiB in base64, and the other fields
MAX_COMMAS = 64 * 1024  # bounds the number of values in a JSON body; base64 has no commas
FILES = ("image", "mask")  # fields that a form may send as files
_A_FILE = {"type": "string", "format": "binary"}

ModelT = TypeVar("ModelT", bound=BaseModel)


async def read_body(http: HttpRequest, model: type[ModelT]) -> ModelT:
    """Read the body into `model`: strict JSON, or a form with the same fields, where images may be files.

    Raises:
        UnsupportedMediaType, ForeignOrigin, BodyTooLarge, MalformedBody: the body cannot be read.
        InvalidRequest: fields are invalid; validation errors are reported per field.
        Cancelled: the caller disconnected before the body was complete.
    """
    content_type = http.headers.get("content-type", "")
    match content_type.partition(";")[0].strip().lower():
        case "application/json":
            validate = partial(model.model_validate_json, await _receive_json(http))
        case "multipart/form-data":
            _check_origin(http)
            validate = partial(model.model_validate_strings, _texts(await _receive(http), content_type, model))
        case _:
            raise UnsupportedMediaType(
                "Send JSON with Content-Type: application/json, or a form as multipart/form-data."
            )
    try:
        return validate()
    except ValidationError as error:
        raise explain(error) from None


def describe_body(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of the bodies that `read_body` accepts."""
    as_json = model.model_json_schema()
    known = as_json["properties"]
    files = {name: {**_A_FILE, "description": known[name]["description"]} for name in FILES if name in known}
    as_form = {**as_json, "properties": known | files}
    content = {"application/json": {"schema": as_json}, "multipart/form-data": {"schema": as_form}}
    return {"required": True, "content": content}


async def _receive(http: HttpRequest) -> bytearray:
    body = bytearray()
    try:
        async for chunk in http.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise BodyTooLarge(f"The body is larger than {MAX_BODY} bytes.")
    except ClientDisconnect:
        raise Cancelled("The caller disconnected before the body was complete.") from None
    return body


async def _receive_json(http: HttpRequest) -> bytearray:
    body = await _receive(http)
    if body.count(b",") > MAX_COMMAS:
        raise BodyTooLarge(f"The body has more than {MAX_COMMAS} values.")
    return body


def _texts(body: bytearray, content_type: str, model: type[BaseModel]) -> dict[str, str]:
    """The fields of a form as text: files in base64, without known fields that are empty."""
    fields = read_form(body, content_type)
    names = [field.name for field in fields]
    texts: dict[str, str] = {}
    for field in fields:
        if names.count(field.name) > 1:
            raise _refuse(field.name, "Sent more than once: send it once.")
        if field.is_file and field.name not in FILES:
            raise _refuse(field.name, f"Sent as a file; only {' and '.join(FILES)} may be files: send it as text.")
        if field.is_file:
            texts[field.name] = binascii.b2a_base64(field.content, newline=False).decode()
        elif field.content or field.name not in model.model_fields:
            texts[field.name] = field.text
    return texts


def _check_origin(http: HttpRequest) -> None:
    """Reject cross-site forms: unlike JSON, browsers post them without a CORS preflight."""
    if http.scope.get(TRUSTED):
        return
    origin = http.headers.get("origin")
    foreign = origin is not None and origin.partition("://")[2] != http.headers.get("host")
    if foreign or http.headers.get("sec-fetch-site") == "cross-site":
        raise ForeignOrigin(
            "The form comes from a page of another origin: serve the page from here, or have the proxy keep Host."
        )


def _refuse(name: str, message: str) -> InvalidRequest:
    field = shorten(name)
    return InvalidRequest(f"{field}: {message}", fields=(FieldError(field, message),))
