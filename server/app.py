"""The HTTP application: the APIs, the web page, the error handlers, and the middleware around them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from server.access.hosts import Hosts
from server.api import loras, openapi, ops, pages
from server.api.error_responses import error_response
from server.api.kserve import routes as kserve
from server.api.native import generate, job_routes
from server.api.native.jobs import Jobs
from server.api.openai import images as openai_images
from server.api.openai import models as openai_models
from server.api.sdapi import routes as sdapi
from server.api.service import Service
from server.middleware.access_log import AccessLog
from server.middleware.authentication import Authentication, Find
from server.middleware.cross_origin import allow_origins
from server.middleware.host_check import HostCheck
from server.middleware.paths import Paths
from server.middleware.security_headers import SecurityHeaders
from server.requests.errors import InternalError, MethodNotAllowed, NotFound, ServerError
from server.version import VERSION

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may call the application, and how."""

    find: Find | None = None  # the caller whose key it is; None: there is no authentication
    hosts: Hosts | None = None  # that are answered; None: all
    origins: Collection[str] = ()  # whose pages may call it


_OPEN = Access()


def make_app(service: Service, access: Access = _OPEN, *, access_log: bool = False) -> ASGIApp:
    """Create the HTTP application. Its lifespan ends when all accepted requests have finished.

    With `access_log` it logs a line for every request.
    """
    refuse = partial(_refuse, service)
    app: ASGIApp = routes(service, asks_for_keys=access.find is not None)
    if access.find is not None:
        app = Authentication(app, find=access.find, refuse=refuse)
    app = allow_origins(Paths(app), access.origins)  # outside of authentication: a preflight has no key
    if access.hosts is not None:
        app = HostCheck(app, hosts=access.hosts, refuse=refuse)
    app = SecurityHeaders(app)
    return AccessLog(app) if access_log else app


def routes(service: Service, *, asks_for_keys: bool = False) -> FastAPI:
    """All routes, and the answers to their errors."""
    jobs = Jobs(service)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with jobs.runner.running():
            yield
            jobs.runner.stop()
            await run_in_threadpool(service.runtime.executor.close)
        service.writers.shutdown(wait=False)

    app = FastAPI(
        version=VERSION,
        docs_url=None,  # see `pages`
        redoc_url=None,
        redirect_slashes=False,  # see `Paths`
        lifespan=lifespan,
        responses=openapi.everywhere(),
        **openapi.DESCRIPTION,
    )
    app.include_router(generate.routes(service, jobs))
    app.include_router(job_routes.routes(jobs))
    app.include_router(openai_images.routes(service))
    app.include_router(openai_models.routes(service))
    app.include_router(sdapi.routes(service))
    app.include_router(kserve.routes(service))
    app.include_router(ops.routes(service))
    app.include_router(loras.routes(service))
    app.include_router(pages.routes())
    app.mount("/playground", pages.page_files())
    app.mount("/docs", pages.swagger_ui_files())
    openapi.describe(app, asks_for_keys=asks_for_keys)
    app.exception_handler(ServerError)(partial(_server_error, service))
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(Exception)(_unhandled)
    return app


async def _server_error(service: Service, http: HttpRequest, error: ServerError) -> Response:
    return _refuse(service, http, error)


def _refuse(service: Service, http: HttpRequest, error: ServerError) -> Response:
    service.runtime.metrics.rejected(error)
    return error_response(http, error)


async def _http_error(http: HttpRequest, error: HTTPException) -> Response:
    """Answer an unknown path or a method that is not allowed."""
    status = HTTPStatus(error.status_code)
    docs = f"{http.scope.get('root_path', '')}/docs"
    kind = MethodNotAllowed if status == HTTPStatus.METHOD_NOT_ALLOWED else NotFound
    response = error_response(http, kind(f"{status.description}: see {docs}."))
    headers = dict(error.headers or {})
    if "GET" in headers.get("Allow", ""):
        headers["Allow"] = "GET, HEAD"  # required with 405; see `Paths`
    response.headers.update(headers)
    return response


async def _unhandled(http: HttpRequest, error: Exception) -> Response:
    _log.error("unhandled exception", exc_info=error)
    return error_response(http, InternalError("Unexpected server error; see the server log."))
