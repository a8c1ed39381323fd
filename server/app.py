"""The one room that wires: a bundle becomes a running service."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException

from engines.base import open_device
from engines.manifest import Manifest
from server import playground
from server.api import generate, ops
from server.api.bodies import problem, problem_response
from server.api.service import Service
from server.batcher import Batcher
from server.compiling import compile_missing
from server.errors import ServerError
from server.executor import Executor
from server.fastest import fastest
from server.intake import Intake
from server.metrics import Metrics
from server.pace import Pace
from server.pipeline import Pipeline
from server.schemas import Problem
from server.settings import Settings
from server.tokenizer import Tokenizer
from server.trace import Trace

_log = logging.getLogger(__name__)
_PAGE = Path(playground.__file__).parent / "index.html"


def make_service(
    manifest: Manifest,
    bundle: Path,
    *,
    backends: Sequence[str],
    settings: Settings,
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[Exception], None] = lambda _error: None,
) -> Service:
    """Wire the rooms around the verified bundle in folder `bundle`.

    When the executor starts, the fastest of `backends` is found and its engines are loaded.
    """
    tokenizer = Tokenizer(
        bundle / manifest.tokenizer.file.path,
        tokens=manifest.context.tokens,
        pad=manifest.tokenizer.pad,
        embeddings=manifest.tokenizer.embeddings,
    )
    intake = Intake(manifest, tokenizer, cache=settings.cache)
    pace = Pace(max_rows=manifest.max_rows)
    trace = Trace(Path(f"latentd-trace-{os.getpid()}.json") if settings.profile else None)
    batcher = Batcher(max_rows=manifest.max_rows, max_waiting=settings.max_waiting, work=pace.work)
    metrics = Metrics(max_rows=manifest.max_rows)

    def load(tell: Callable[[str], None]) -> Pipeline:
        def stopped() -> bool:
            return batcher.closed

        backend = fastest(manifest, bundle, backends, threads=settings.threads, tell=tell, stopped=stopped)
        whole = manifest
        if settings.compile:
            whole = compile_missing(manifest, bundle, backend, tell=tell, stopped=stopped)
        service.manifest, service.backend = whole, backend
        metrics.loaded(whole, backend)
        tell("loading the engines")
        return Pipeline.load(
            whole,
            bundle,
            backend=backend,
            device=open_device(backend, threads=settings.threads),
            pace=pace,
            trace=trace,
            decode_chunk=settings.decode_chunk,
            decode_beside=settings.decode_beside,
            on_lookup=metrics.prompt_lookup,
        )

    executor = Executor(
        batcher,
        load,
        pace=pace,
        trace=trace,
        metrics=metrics,
        patience=settings.watchdog,
        on_ready=on_ready,
        on_failure=on_failure,
    )
    gauges = {
        "latentd_requests_waiting": ("Accepted requests that wait for their first step.", lambda: batcher.waiting),
        "latentd_requests_running": ("Requests that take steps.", lambda: batcher.running),
        "latentd_requests_departing": ("Requests whose pictures are decoded.", lambda: executor.departing),
        "latentd_ready": ("1 when requests are answered.", lambda: float(executor.ready)),
    }
    metrics.watch(gauges, pace)
    service = Service(manifest, backends[0], intake, batcher, executor, metrics)
    return service


def make_app(service: Service) -> FastAPI:
    """The HTTP application over `service`. Its lifespan starts the executor and lets accepted requests finish."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.executor.start()
        yield
        service.executor.close()
        service.writers.shutdown(wait=False)

    app = FastAPI(
        title="latentd",
        version=version("latentd"),
        summary="Pictures from text, batched at the denoising step.",
        lifespan=lifespan,
    )
    app.include_router(generate.routes(service))
    app.include_router(ops.routes(service))
    app.exception_handler(ServerError)(partial(_server_error, service))
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(Exception)(_bug)

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(_PAGE)

    return app


async def _server_error(service: Service, _http: HttpRequest, error: ServerError) -> JSONResponse:
    service.metrics.rejected(error)
    return problem_response(problem(error), retry_after=error.retry_after)


async def _http_error(_http: HttpRequest, error: HTTPException) -> JSONResponse:
    """No such page, or not that method."""
    status = HTTPStatus(error.status_code)
    document = Problem(title=status.phrase, status=status, detail=f"{status.description}: see /docs.")
    response = problem_response(document)
    response.headers.update(error.headers or {})  # Allow, which a 405 must have
    return response


async def _bug(_http: HttpRequest, error: Exception) -> JSONResponse:
    _log.error("unexpected", exc_info=error)
    return problem_response(Problem(title="Internal error", status=500, detail="A fault of the server; it is logged."))
