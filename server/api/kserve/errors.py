"""Errors as clients of the Open Inference Protocol read them."""

from __future__ import annotations

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from server.requests.errors import STATUS, ServerError


class KServeError(BaseModel):
    """An error, as clients of the protocol read it."""

    error: str


def error_response(error: ServerError) -> Response:
    return JSONResponse(KServeError(error=error.detail).model_dump(), STATUS[type(error)])
