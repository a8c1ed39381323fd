"""`GET progress`, `POST interrupt` and `POST skip`: of the caller's own calls."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from server.api import openapi
from server.api.bodies import check_origin
from server.api.context import caller_of
from server.api.sdapi.errors import Error
from server.api.sdapi.tasks import Task, Tasks
from server.requests import images
from server.requests.params import Image

_FOREIGN: dict[int | str, dict[str, Any]] = {403: {"model": Error, "description": "From a page of another origin."}}


class State(BaseModel):
    """Where the call is."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = Field("", description="force_task_id of the call, or a random id")
    job_count: int = Field(0, description="requests of the call; 0 while there is none")
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class Progress(BaseModel):
    """The caller's oldest call in progress."""

    progress: float = Field(0.0, ge=0, le=1, description="0 only while there is no call")
    eta_relative: float = Field(0.0, description="estimated seconds left")
    state: State = State()
    current_image: str | None = Field(None, description="preview of the first image: a small PNG file in base64")
    textinfo: str | None = None


def routes(tasks: Tasks) -> APIRouter:
    router = APIRouter(tags=[openapi.SDAPI])

    @router.get("/progress", operation_id="sdapi_progress", summary="Progress of the caller's call, with a preview")
    async def progress(http: HttpRequest, skip_current_image: bool = False) -> Progress:
        task = next(tasks.of(caller_of(http)), None)
        if task is None:
            return Progress()
        preview = None if skip_current_image else task.preview
        return Progress(
            progress=task.progress,
            eta_relative=task.seconds_left,
            state=_state(task),
            current_image=None if preview is None else await run_in_threadpool(_png, preview),
            textinfo=None if task.started else "Waiting in the queue",
        )

    @router.post(
        "/interrupt",
        operation_id="sdapi_interrupt",
        summary="End the caller's calls; an administrator's: all",
        responses=_FOREIGN,
    )
    async def interrupt(http: HttpRequest) -> dict[str, str]:
        check_origin(http)
        for task in list(tasks.of(caller_of(http))):
            task.interrupt()
        return {}

    @router.post(
        "/skip",
        operation_id="sdapi_skip",
        summary="End the running batch of the caller's calls",
        responses=_FOREIGN,
    )
    async def skip(http: HttpRequest) -> None:
        check_origin(http)
        for task in list(tasks.of(caller_of(http))):
            task.skip()

    return router


def _state(task: Task) -> State:
    return State(
        skipped=task.is_skipped,
        interrupted=task.interrupted is not None,
        job=task.id,
        job_count=task.job_count,
        job_timestamp=task.timestamp,
        job_no=task.job_no,
        sampling_step=task.step,
        sampling_steps=task.steps,
    )


def _png(preview: Image) -> str:
    return base64.b64encode(images.encode(preview, "png")).decode()
