"""Read request bodies; shared by every API."""

from __future__ import annotations

import binascii
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from server.api.body_limits import SMALL, Lease
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

T = TypeVar("T")
ModelT = TypeVar("ModelT", bound=BaseModel)
OtherT = TypeVar("OtherT", bound=BaseModel)


async def read_body(http: HttpRequest, model: type[ModelT], lease: Lease) -> ModelT:
    """Read the body into `model`: strict JSON, or a form with the same fields, where images may be files.

    `lease` takes the memory; large bodies are parsed in a worker thread.

    Raises:
        UnsupportedMediaType, ForeignOrigin, BodyTooLarge, TooManyBodies, MalformedBody: the body cannot be read.
        InvalidRequest: fields are invalid; validation errors are reported per field.
        Cancelled: the caller disconnected before the body was complete.
    """
    return await _read(http, lease, as_json=partial(_parse_json, model), as_form=partial(_parse_form, model))


async def read_either(http: HttpRequest, model: type[ModelT], other: type[OtherT], lease: Lease) -> ModelT | OtherT:
    """As `read_body`, or into `other`: JSON with all that is required of it and lacks what is required of `model`."""
    as_json = partial(_parse_either, model, other)
    return await _read(http, lease, as_json=as_json, as_form=partial(_parse_form, model))


async def read_any_json(http: HttpRequest, model: type[ModelT], lease: Lease) -> ModelT:
    """Read JSON into `model`, whatever Content-Type says, or nothing, which is an empty object.

    Raises as `read_body`; browsers send such bodies to other origins without asking first, as they do forms.
    """
    check_origin(http)
    _check_encoding(http)
    return await _parse_in_turn(await _receive(http, lease), lease, partial(_parse_json_or_nothing, model))


async def _read(
    http: HttpRequest,
    lease: Lease,
    *,
    as_json: Callable[[bytearray], T],
    as_form: Callable[[str, bytearray], T],
) -> T:
    content_type = http.headers.get("content-type", "")
    parse: Callable[[bytearray], T]
    match content_type.partition(";")[0].strip().lower():
        case "application/json":
            parse = as_json
        case "multipart/form-data":
            check_origin(http)
            parse = partial(as_form, content_type)
        case _:
            raise UnsupportedMediaType(
                "Send JSON with Content-Type: application/json, or a form as multipart/form-data."
            )
    _check_encoding(http)
    return await _parse_in_turn(await _receive(http, lease), lease, parse)


async def _parse_in_turn(body: bytearray, lease: Lease, parse: Callable[[bytearray], T]) -> T:
    """Parse it here, or if it is large in a thread, when no other is parsed."""
    if len(body) <= SMALL:
        return parse(body)
    async with lease.limits.parsers:
        return await run_in_threadpool(parse, body)


def describe_body(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of the bodies that `read_body` accepts."""
    as_json = model.model_json_schema()
    known = as_json["properties"]
    files = {name: {**_A_FILE, "description": known[name]["description"]} for name in FILES if name in known}
    as_form = {**as_json, "properties": known | files}
    content = {"application/json": {"schema": as_json}, "multipart/form-data": {"schema": as_form}}
    return {"required": True, "content": content}


def _check_encoding(http: HttpRequest) -> None:
    encoding = http.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedMediaType(
            f"Content-Encoding {shorten(encoding)} is not supported: send the body uncompressed."
        )


async def _receive(http: HttpRequest, lease: Lease) -> bytearray:
    length = http.headers.get("content-length", "")
    if length.isdecimal():
        check_size(int(length))
        lease.expect(int(length))
    body = bytearray()
    try:
        async for chunk in http.stream():
            check_size(len(body) + len(chunk))
            lease.grow_to(len(body) + len(chunk))
            body += chunk
    except ClientDisconnect:
        raise Cancelled("The caller disconnected before the body was complete.") from None
    return body


def check_size(size: int) -> None:
    """Raise BodyTooLarge for a body of so many bytes."""
    if size > MAX_BODY:
        raise BodyTooLarge(f"The body is larger than {MAX_BODY} bytes: send smaller files.")


def _parse_json(model: type[ModelT], body: bytearray) -> ModelT:
    _check_values(body)
    return _validate(model, partial(model.model_validate_json, body))


def _parse_json_or_nothing(model: type[ModelT], body: bytearray) -> ModelT:
    return _parse_json(model, body if body.strip() else bytearray(b"{}"))


def _parse_either(model: type[ModelT], other: type[OtherT], body: bytearray) -> ModelT | OtherT:
    _check_values(body)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:  # only then is there anything to decide: valid bodies lose no time
        if _required(other) <= _named(error, "extra_forbidden") and _required(model) <= _named(error, "missing"):
            return _validate(other, partial(other.model_validate_json, body))
        raise explain(error, model) from None


def _check_values(body: bytearray) -> None:
    if body.count(b",") > MAX_COMMAS:
        raise BodyTooLarge(f"The body has more than {MAX_COMMAS} values.")


def _required(model: type[BaseModel]) -> set[str]:
    return {name for name, field in model.model_fields.items() if field.is_required()}


def _named(error: ValidationError, kind: str) -> set[str]:
    """The top-level fields that have an error of this kind."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return {str(item["loc"][0]) for item in found if item["type"] == kind}


def _parse_form(model: type[ModelT], content_type: str, body: bytearray) -> ModelT:
    return _validate(model, partial(model.model_validate_strings, _texts(body, content_type, model)))


def _validate(model: type[ModelT], validate: Callable[[], ModelT]) -> ModelT:
    try:
        return validate()
    except ValidationError as error:
        raise explain(error, model) from None


def _texts(body: bytearray, content_type: str, model: type[BaseModel]) -> dict[str, str]:
    """The fields of a form as text: files in base64, without known fields that are empty.

    The names in the `LISTS` of a model may be sent as `name[]`, as clients do with lists.
    """
    fields = read_form(body, content_type)
    lists: Collection[str] = getattr(model, "LISTS", ())
    names: set[str] = set()
    texts: dict[str, str] = {}
    for field in fields:
        name = field.name.removesuffix("[]") if field.name.removesuffix("[]") in lists else field.name
        if name in names:
            raise _refuse(name, "Sent more than once: send it once.")
        names.add(name)
        if field.is_file and name not in FILES:
            raise _refuse(name, f"Sent as a file; only {' and '.join(FILES)} may be files: send it as text.")
        if field.is_file:
            texts[name] = binascii.b2a_base64(field.content, newline=False).decode()
        elif field.content or name not in model.model_fields:
            texts[name] = field.text
    return texts


def check_origin(http: HttpRequest) -> None:
    """Reject cross-site forms: unlike JSON, browsers post them, and nothing at all, without a CORS preflight."""
    if http.scope.get(TRUSTED):
        return
    origin = http.headers.get("origin")
    foreign = origin is not None and origin.partition("://")[2] != http.headers.get("host")
    if foreign or http.headers.get("sec-fetch-site") == "cross-site":
        raise ForeignOrigin(
            "This comes from a page of another origin: serve the page from here, or have the proxy keep Host."
        )


def _refuse(name: str, message: str) -> InvalidRequest:
    field = shorten(name)
    return InvalidRequest(f"{field}: {message}", fields=(FieldError(field, message),))
