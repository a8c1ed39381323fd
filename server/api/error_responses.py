"""Error responses: each API has a shape of its own for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastapi import Request as HttpRequest
from starlette.responses import Response

import server.api.kserve.errors
import server.api.openai.errors
import server.api.sdapi.errors
from server.api.context import request_id_of
from server.api.problems import problem, problem_response
from server.api.retry_after import spread
from server.requests.errors import RateLimited, ServerError

Shape = Callable[[ServerError], Response]
_KEY = "latentd.error_shape"  # of the scope


def problem_details(error: ServerError) -> Response:
    """The shape of latentd's own API: RFC 9457."""
    return problem_response(problem(error))


_BY_PREFIX: Mapping[str, Shape] = {
    "/v2/": server.api.kserve.errors.error_response,
    "/v1/": server.api.openai.errors.error_response,
    "/sdapi/": server.api.sdapi.errors.error_response,
}


def use_shape(http: HttpRequest, shape: Shape) -> None:
    """Answer errors of this request in `shape`, whatever its path says."""
    http.scope[_KEY] = shape


def error_response(http: HttpRequest, error: ServerError) -> Response:
    """`error` in the shape of the API that the request was sent to."""
    response = _shape_of(http)(error)
    response.headers["X-Request-Id"] = request_id_of(http)
    if error.retry_after is not None:
        alone = isinstance(error, RateLimited)  # others are refused for other times, and this one is exact
        response.headers["Retry-After"] = str(error.retry_after if alone else spread(error.retry_after))
    return response


def _shape_of(http: HttpRequest) -> Shape:
    if chosen := http.scope.get(_KEY):
        shape: Shape = chosen
        return shape
    path = http.scope["path"].removeprefix(http.scope.get("root_path", ""))
    return next((shape for prefix, shape in _BY_PREFIX.items() if path.startswith(prefix)), problem_details)
