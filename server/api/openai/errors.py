"""Errors as OpenAI's clients read them."""

from __future__ import annotations

from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from server.requests.errors import STATUS, ContentBlocked, DeadlineExceeded, PromptRefused, ServerError, UnknownModel

_CODES: dict[type[ServerError], str] = {
    UnknownModel: "model_not_found",
    ContentBlocked: "moderation_blocked",
    PromptRefused: "moderation_blocked",
}
_CODES_OF_STATUS = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


class OpenAIError(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = Field(description="the field that it is about")
    code: str | None


class OpenAIErrorResponse(BaseModel):
    """An error, as OpenAI's API has it."""

    error: OpenAIError


def status_of(error: type[ServerError]) -> int:
    """The HTTP status: clients raise BadRequestError for 400, and OpenAI sends no 422."""
    return 400 if STATUS[error] == 422 else STATUS[error]


def error_document(error: ServerError) -> OpenAIErrorResponse:
    """`{"error": {"message", "type", "param", "code"}}`."""
    param = error.fields[0].field if error.fields else None
    described = OpenAIError(message=error.detail, type=_type(error), param=param, code=_code(error))
    return OpenAIErrorResponse(error=described)


def error_response(error: ServerError) -> Response:
    headers = {"X-Should-Retry": "false"} if isinstance(error, DeadlineExceeded) else None
    return JSONResponse(error_document(error).model_dump(), status_of(type(error)), headers)


def _type(error: ServerError) -> str:
    status = status_of(type(error))
    if status == 429:
        return "requests"
    return "invalid_request_error" if status < 500 else "server_error"


def _code(error: ServerError) -> str | None:
    kind = type(error)
    return _CODES.get(kind, _CODES_OF_STATUS.get(status_of(kind)))
