"""`POST txt2img` and `POST img2img`: one call is one or more requests, one after the other."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool

from server.api import openapi
from server.api.context import context_of
from server.api.error_responses import error_response
from server.api.routes import RawRoute
from server.api.sdapi.bodies import describe_json, read_json
from server.api.sdapi.choices import Choices
from server.api.sdapi.errors import in_its_words, responses
from server.api.sdapi.info import info
from server.api.sdapi.inpainting import Canvas
from server.api.sdapi.tasks import Task, Tasks
from server.api.sdapi.translation.checkpoint import find_checkpoint
from server.api.sdapi.translation.plan import Plan, plan
from server.api.sdapi.translation.schemas import Generated, Img2Img, Txt2Img
from server.api.service import Accepted, Service
from server.requests.context import Caller, RequestContext
from server.requests.errors import DeadlineExceeded, InvalidRequest, ServerError
from server.requests.request import Completed, Request
from server.requests.schemas import GenerateRequest
from server.runtime.models import Model

_CHECKPOINT = "sd_model_checkpoint"


def routes(service: Service, tasks: Tasks, choices: Choices) -> APIRouter:
    def model_of(body: Txt2Img, caller: Caller) -> Model:
        wanted = (body.override_settings or {}).get(_CHECKPOINT)
        found = find_checkpoint(service.models, wanted, field=f"override_settings.{_CHECKPOINT}")
        return found or choices.of(caller)

    router = APIRouter(route_class=RawRoute, tags=[openapi.SDAPI])

    @router.post(
        "/txt2img",
        operation_id="sdapi_txt2img",
        summary="Generate images from a prompt",
        response_model=Generated,
        responses=responses(),
        openapi_extra=describe_json(Txt2Img),
    )
    async def txt2img(http: HttpRequest) -> Response:
        context = context_of(http, "sdapi")
        service.check(context.caller)
        body = await read_json(http, Txt2Img, service)
        model = model_of(body, context.caller)
        return await _respond(
            service, tasks, http, _Call(body, model, plan(body, model.manifest, model=model.name), context)
        )

    @router.post(
        "/img2img",
        operation_id="sdapi_img2img",
        summary="Generate images from an image",
        response_model=Generated,
        responses=responses(),
        openapi_extra=describe_json(Img2Img),
    )
    async def img2img(http: HttpRequest) -> Response:
        context = context_of(http, "sdapi")
        service.check(context.caller)
        with service.bodies.lease() as lease:  # until the reply: an inpainted image is put into the one that was sent
            body = await read_json(http, Img2Img, service, lease)
            model = model_of(body, context.caller)
            made = plan(body, model.manifest, model=model.name)
            canvas = Canvas.of(body, model.manifest, images=made.images)
            async with service.readers:
                fields = await run_in_threadpool(canvas.prepare)
            return await _respond(service, tasks, http, _Call(body, model, made, context, canvas, fields))

    return router


@dataclass
class _Call:
    """One call, and what it has produced so far."""

    body: Txt2Img
    model: Model
    plan: Plan
    context: RequestContext
    canvas: Canvas | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)  # of every request, besides those of the plan
    began: float = field(default_factory=time.perf_counter)
    done: list[Request] = field(default_factory=list)
    files: list[bytes] = field(default_factory=list)  # PNG
    flagged: list[bool | None] = field(default_factory=list)  # the safety checker's verdicts

    @property
    def context_now(self) -> RequestContext:
        """The context, with the time that is left of the limit. Raises DeadlineExceeded."""
        timeout = self.context.timeout
        if timeout is None:
            return self.context
        left = timeout - (time.perf_counter() - self.began)
        if left <= 0:
            raise DeadlineExceeded("The time limit of this call passed before its images were done.")
        return replace(self.context, timeout=left)


async def _respond(service: Service, tasks: Tasks, http: HttpRequest, call: _Call) -> Response:
    task = Task(call.context.caller.name, len(call.plan.bodies))
    if call.body.force_task_id:
        task.id = call.body.force_task_id
    async with tasks.running(task), _interrupted_on_disconnect(task, http):
        if error := await _generate(service, task, call):
            return error_response(http, error)
    headers = {"X-Request-Id": call.done[0].id}
    content = await run_in_threadpool(_document, task, call)
    return Response(content, headers=headers, media_type="application/json")


async def _generate(service: Service, task: Task, call: _Call) -> ServerError | None:
    """Make the images. Return why there are none, or not those that were asked for.

    An interrupted or skipped call has the images that were complete by then, if there are any.
    """
    ended: ServerError | None = None
    for body in call.plan.bodies:
        accepted = await task.wait_for_place(partial(_accept, service, call, body))
        if accepted is None:
            break
        outcome = await task.follow(accepted)
        if isinstance(outcome, Completed):
            await _keep(service, call, accepted.request, outcome)
        elif task.is_skipped or task.interrupted:
            ended = outcome.error
        else:
            return outcome.error
    return None if call.done else task.interrupted or ended


async def _accept(service: Service, call: _Call, body: GenerateRequest) -> Accepted:
    try:
        return await service.accept(body.model_copy(update=call.fields), call.context_now, follows=True)
    except InvalidRequest as error:
        raise in_its_words(error) from None


async def _keep(service: Service, call: _Call, request: Request, completed: Completed) -> None:
    if call.canvas:
        completed = await run_in_threadpool(call.canvas.paste, completed)
    files = await service.encode_images(request, completed, "png")
    call.done.append(request)
    call.files.extend(files.contents)
    call.flagged.extend(files.flagged)


def _document(task: Task, call: _Call) -> str:
    parameters = call.plan.parameters
    if isinstance(call.body, Img2Img) and call.body.include_init_images:
        mask = call.body.mask
        parameters = {
            **parameters,
            "init_images": [_base64(image) for image in call.body.init_images],
            "mask": None if mask is None else _base64(mask),
        }
    return Generated(
        images=[] if call.body.send_images is False else [_base64(file) for file in call.files],
        parameters=parameters,
        info=info(call.plan, task, call.done, call.flagged, call.model),
    ).model_dump_json()


def _base64(file: bytes) -> str:
    return base64.b64encode(file).decode()


@asynccontextmanager
async def _interrupted_on_disconnect(task: Task, http: HttpRequest) -> AsyncIterator[None]:
    watcher = asyncio.ensure_future(_watch(task, http))
    try:
        yield
    finally:
        watcher.cancel()


async def _watch(task: Task, http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    task.interrupt()
