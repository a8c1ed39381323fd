"""The one room that wires: a bundle becomes a running service."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
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
from server.errors import ServerError
from server.executor import Executor
from server.intake import Intake
from server.metrics import Metrics
from server.pipeline import Pipeline
from server.request import Request
from server.schemas import GenerateRequest, Problem
from server.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_PAGE = Path(playground.__file__).parent / "index.html"


def make_service(  # noqa: PLR0913 - the parts, all by keyword
    manifest: Manifest,
    bundle: Path,
    *,
    backend: str,
    threads: int,
    max_waiting: int,
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[Exception], None] = lambda _error: None,
) -> Service:
    """Wire the rooms around the verified bundle in folder `bundle`. Engines are loaded when the executor starts."""
    tokenizer = Tokenizer(
        bundle / manifest.tokenizer.file.path,
        tokens=manifest.context.tokens,
        pad=manifest.tokenizer.pad,
        embeddings=manifest.tokenizer.embeddings,
    )
    intake = Intake(manifest, tokenizer)
    batcher = Batcher(max_rows=manifest.max_rows, max_waiting=max_waiting)
    metrics = Metrics(manifest, backend)
    executor = Executor(
        batcher,
        lambda: Pipeline.load(
            manifest,
            bundle,
            backend=backend,
            device=open_device(backend, threads=threads),
            on_lookup=metrics.prompt_lookup,
        ),
        warm_up=_rehearsals(manifest, intake),
        metrics=metrics,
        on_ready=on_ready,
        on_failure=on_failure,
    )
    metrics.watch(waiting=lambda: batcher.waiting, running=lambda: batcher.running, ready=lambda: float(executor.ready))
    return Service(manifest, backend, intake, batcher, executor, metrics)


def make_app(service: Service) -> FastAPI:
    """The HTTP application over `service`. Its lifespan starts the executor and lets accepted requests finish."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.executor.start()
        yield
        service.executor.close()

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


def _rehearsals(manifest: Manifest, intake: Intake) -> list[Request]:
    return [
        intake.request(GenerateRequest(prompt="", width=size.width, height=size.height, num_inference_steps=1, seed=0))
        for size in manifest.resolutions
    ]


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
