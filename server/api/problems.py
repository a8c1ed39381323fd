"""Problem details (RFC 9457), and validation errors in words that name the field."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from pydantic import ValidationError

from server.api.retry_after import spread
from server.requests.errors import STATUS, FieldError, InvalidRequest, MalformedBody, ServerError
from server.requests.schemas import Problem

_ECHO = 200  # characters of caller-supplied text in a response
_MOST_ERRORS = 10


def explain(error: ValidationError) -> ServerError:
    """The error that tells the caller what is wrong with which field."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    if found[0]["type"] == "json_invalid":
        return MalformedBody(shorten(found[0]["msg"]))
    fields = tuple(
        FieldError(shorten(".".join(map(str, item["loc"])) or "body"), shorten(item["msg"]))
        for item in found[:_MOST_ERRORS]
    )
    return InvalidRequest(f"{fields[0].field}: {fields[0].message}", fields=fields)


def shorten(text: str) -> str:
    """`text`, cut to what a response may echo."""
    return text if len(text) <= _ECHO else text[: _ECHO - 1] + "…"


def problem(error: ServerError) -> Problem:
    """`error` as problem details (RFC 9457)."""
    return Problem(
        title=_words(type(error).__name__),
        status=STATUS[type(error)],
        detail=error.detail,
        errors=[{"field": field.field, "message": field.message} for field in error.fields],
    )


def problem_response(document: Problem, *, retry_after: int | None = None) -> JSONResponse:
    headers = {} if retry_after is None else {"Retry-After": str(spread(retry_after))}
    return JSONResponse(document.model_dump(), document.status, headers, media_type="application/problem+json")


def _words(name: str) -> str:
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip().capitalize()
