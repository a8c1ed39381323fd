"""Problem details (RFC 9457), and validation errors in words that name the field."""

from __future__ import annotations

import codecs
from functools import cache

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from server.api.retry_after import spread
from server.requests.errors import STATUS, FieldError, InvalidRequest, MalformedBody, ServerError
from server.requests.field_names import hint
from server.requests.schemas import GenerateRequest, Problem

_ECHO = 200  # characters of caller-supplied text in a response
_MOST_ERRORS = 10
_BOUNDS = {  # of JSON Schema, and what pydantic calls them
    "minimum": "greater than or equal to",
    "exclusiveMinimum": "greater than",
    "maximum": "less than or equal to",
    "exclusiveMaximum": "less than",
}
_ALTERNATIVES = {"seed": ": leave it out for a random one"}


def explain(error: ValidationError, model: type[BaseModel] = GenerateRequest) -> ServerError:
    """The error that tells the caller what is wrong with which field of `model`."""
    found = error.errors(include_url=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        return MalformedBody(_not_utf8(found[0]["input"]) or shorten(found[0]["msg"]))
    fields = tuple(
        FieldError(shorten(".".join(map(str, item["loc"])) or "body"), shorten(_message(item, model)))
        for item in found[:_MOST_ERRORS]
    )
    return InvalidRequest(f"{fields[0].field}: {fields[0].message}", fields=fields)


def _not_utf8(body: bytes | bytearray | str) -> str | None:
    """Why JSON that cannot be parsed is not UTF-8 (RFC 8259, section 8.1); None if it is."""
    content = body.encode() if isinstance(body, str) else body
    if content.startswith(codecs.BOM_UTF8):
        return "Invalid JSON: it begins with a byte-order mark: send UTF-8 without one."
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 0 in content[:2]:
        return "Invalid JSON: it is in UTF-16 or UTF-32: send UTF-8."
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"Invalid JSON: byte {error.start} is not UTF-8: send UTF-8."
    return None


def _message(item: ErrorDetails, model: type[BaseModel]) -> str:
    """What is wrong with one field, and what to send instead."""
    field = str(item["loc"][0]) if item["loc"] else ""
    match item["type"]:
        case "extra_forbidden":
            return f"Unknown field: {hint(field, model.model_fields)}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal" if bounds := _bounds(model).get(
            field
        ):
            return f"Input should be {bounds}{_ALTERNATIVES.get(field, '')}"
        case _:
            return item["msg"]


@cache
def _bounds(model: type[BaseModel]) -> dict[str, str]:
    """Both bounds of each numeric field, in pydantic's words."""
    schemas = model.model_json_schema()["properties"]
    found = {}
    for field, schema in schemas.items():
        number = schema.get("anyOf", [schema])[0]
        if words := [f"{word} {number[key]:.16g}" for key, word in _BOUNDS.items() if key in number]:
            found[field] = " and ".join(words)
    return found


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
