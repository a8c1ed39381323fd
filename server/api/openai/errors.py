"""Errors as OpenAI's clients read them."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from server.requests.errors import STATUS, ServerError


def error_response(error: ServerError) -> Response:
    """`{"error": {"message", "type", "param", "code"}}`."""
    status = STATUS[type(error)]
    param = error.fields[0].field if error.fields else None
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": error.detail, "type": kind, "param": param, "code": None}}, status)
