"""Errors as clients of AUTOMATIC1111's web UI read them."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from server.requests.errors import STATUS, ServerError


def error_response(error: ServerError) -> Response:
    """`{"detail": …}`, as FastAPI has it."""
    return JSONResponse({"detail": error.detail}, STATUS[type(error)])
