"""The HTTP application: the APIs, the web page, and the error handlers."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException

from server import playground
from server.api import generate, ops
from server.api.problems import problem, problem_response
from server.api.service import Service
from server.requests.errors import ServerError
from server.requests.schemas import Problem

_log = logging.getLogger(__name__)
_PAGE = Path(playground.__file__).parent / "index.html"


def make_app(service: Service) -> FastAPI:
    """Create the HTTP application. Its lifespan ends when all accepted requests have finished."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        service.runtime.executor.close()
        service.writers.shutdown(wait=False)

    app = FastAPI(
        title="latentd",
        version=version("latentd"),
        summary="Stable Diffusion server that batches requests at the denoising step.",
        lifespan=lifespan,
    )
    app.include_router(generate.routes(service))
    app.include_router(ops.routes(service))
    app.exception_handler(ServerError)(partial(_server_error, service))
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(Exception)(_unhandled)

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(_PAGE)

    return app


async def _server_error(service: Service, _http: HttpRequest, error: ServerError) -> JSONResponse:
    service.runtime.metrics.rejected(error)
    return problem_response(problem(error), retry_after=error.retry_after)


async def _http_error(_http: HttpRequest, error: HTTPException) -> JSONResponse:
    """Answer an unknown path or a method that is not allowed."""
    status = HTTPStatus(error.status_code)
    document = Problem(title=status.phrase, status=status, detail=f"{status.description}: see /docs.")
    response = problem_response(document)
    response.headers.update(error.headers or {})  # Allow, which is required with 405
    return response


async def _unhandled(_http: HttpRequest, error: Exception) -> JSONResponse:
    _log.error("unhandled exception", exc_info=error)
    return problem_response(
        Problem(title="Internal error", status=500, detail="Unexpected server error; see the server log.")
    )
