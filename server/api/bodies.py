"""Reading bodies and writing problems: the strict edge that every face shares."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from server.errors import (
    STATUS,
    BodyTooLarge,
    Cancelled,
    FieldError,
    InvalidRequest,
    MalformedBody,
    ServerError,
    UnsupportedMediaType,
)
from server.schemas import Problem

MAX_BODY = 64 * 1024  # bytes
_ECHO = 200  # characters of a caller's own words in an answer
_MOST_ERRORS = 10

Body = TypeVar("Body", bound=BaseModel)


async def read_body(http: HttpRequest, model: type[Body]) -> Body:
    """Read the body as strict JSON into `model`.

    Raises:
        UnsupportedMediaType, BodyTooLarge, MalformedBody, InvalidRequest: what is wrong, field by field.
        Cancelled: the caller went away before the body was whole.
    """
    media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":  # also keeps pages of other origins from posting without being asked
        raise UnsupportedMediaType("Send JSON, with the header Content-Type: application/json.")
    body = bytearray()
    try:
        async for chunk in http.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise BodyTooLarge(f"The body is larger than {MAX_BODY} bytes.")
    except ClientDisconnect:
        raise Cancelled("The caller went away before the body was whole.") from None
    try:
        return model.model_validate_json(bytes(body))
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> ServerError:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    if found[0]["type"] == "json_invalid":
        return MalformedBody(_shorten(found[0]["msg"]))
    fields = tuple(
        FieldError(_shorten(".".join(map(str, item["loc"])) or "body"), _shorten(item["msg"]))
        for item in found[:_MOST_ERRORS]
    )
    return InvalidRequest(f"{fields[0].field}: {fields[0].message}", fields=fields)


def _shorten(text: str) -> str:
    return text if len(text) <= _ECHO else text[: _ECHO - 1] + "…"


def problem(error: ServerError) -> Problem:
    """`error` as an RFC 9457 document."""
    return Problem(
        title=_words(type(error).__name__),
        status=STATUS[type(error)],
        detail=error.detail,
        errors=[{"field": field.field, "message": field.message} for field in error.fields],
    )


def problem_response(document: Problem, *, retry_after: int | None = None) -> JSONResponse:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse(document.model_dump(), document.status, headers, media_type="application/problem+json")


def _words(name: str) -> str:
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip().capitalize()
