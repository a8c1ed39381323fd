"""The documents and events of latentd's own API."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from server.api.service import Files
from server.requests import images
from server.requests.images import ImageFormat
from server.requests.params import Image
from server.requests.request import Request, Started, Stepped
from server.requests.schemas import (
    GeneratedImage,
    GenerateResponse,
    Parameters,
    QueuedEvent,
    StartedEvent,
    StepEvent,
    Timings,
)


def response_of(request: Request, files: Files, *, image_format: ImageFormat) -> GenerateResponse:
    """The answer to a request."""
    params = request.params
    return GenerateResponse(
        id=request.id,
        model=params.model,
        images=generated(params.seeds, files.contents, image_format, files.flagged),
        parameters=Parameters.of(params),
        timings=timings_of(request, files),
        warnings=params.warnings,
    )


def generated(
    seeds: Sequence[int], contents: Sequence[bytes], image_format: ImageFormat, flagged: Sequence[bool | None]
) -> list[GeneratedImage]:
    """The images with their verdicts; None: not checked."""
    return [
        GeneratedImage(
            seed=seed, format=image_format, image=base64.b64encode(content).decode(), nsfw_content_detected=flag
        )
        for seed, content, flag in zip(seeds, contents, flagged, strict=True)
    ]


def timings_of(request: Request, files: Files) -> Timings:
    spent = request.timings
    return Timings(
        queue=spent["queue"],
        encode=spent["encode"],
        denoise=spent["denoise"],
        decode=spent["decode"],
        image=files.seconds,
        total=sum(spent.values()) + files.seconds,
    )


def server_timing(timings: Timings) -> str:
    """The header `Server-Timing`."""
    return ", ".join(f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in timings.model_dump().items())


def image_headers(seed: int, warnings: Sequence[str], flagged: bool | None) -> dict[str, str]:
    """What an answer that is an image file says of it."""
    known = {"X-Seed": str(seed)} | ({} if flagged is None else {"X-NSFW-Content-Detected": json.dumps(flagged)})
    return known | ({"X-Warnings": json.dumps(warnings)} if warnings else {})  # JSON keeps the header in ASCII


def event(name: str, document: BaseModel) -> bytes:
    return format_sse_event(event=name, data_str=document.model_dump_json())


async def progress_event(name: str, update: QueuedEvent | Started | Stepped | None) -> bytes:
    """The event of an update before the outcome, of the request or job `name`; previews are JPEG."""
    match update:
        case None:
            return KEEPALIVE_COMMENT
        case QueuedEvent():
            return event("queued", update)
        case Started():
            return event("started", StartedEvent(id=name))
        case Stepped(step, steps, previews):
            urls = [await run_in_threadpool(_data_url, preview) for preview in previews]
            return event("step", StepEvent(step=step, steps=steps, preview=urls[0] if urls else None, previews=urls))


def _data_url(image: Image) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(images.encode(image, "jpeg")).decode()
