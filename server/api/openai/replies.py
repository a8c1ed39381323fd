"""What OpenAI's clients get: a document with the images, or an event for each unfinished one and the image."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from dataclasses import dataclass
from typing import Literal, Self

from fastapi.sse import format_sse_event
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from server.api.openai.errors import error_document
from server.api.openai.schemas import (
    CompletedEvent,
    ImageData,
    ImagesBody,
    ImagesResponse,
    PartialImageEvent,
    TokenDetails,
    Usage,
)
from server.api.service import Files, Service
from server.requests import images
from server.requests.images import ImageFormat
from server.requests.params import Image
from server.requests.request import Completed, Event, Failed, Request, Stepped

Operation = Literal["image_generation", "image_edit"]


@dataclass(frozen=True, slots=True)
class Reply:
    """How the caller wants the images: the fields of a body that decide it, without the body's files."""

    operation: Operation
    image_format: ImageFormat
    quality: int | None  # of JPEG and WebP
    response_format: Literal["url", "b64_json"] | None
    streams: bool
    partial_images: int

    @classmethod
    def to(cls, body: ImagesBody, operation: Operation) -> Self:
        return cls(
            operation,
            body.output_format or "png",
            body.output_compression,
            body.response_format,
            bool(body.stream),
            body.partial_images or 0,
        )

    @staticmethod
    def headers(request: Request, files: Files) -> dict[str, str]:
        """The request's id, the milliseconds that each stage took, and warnings, for which documents have no place."""
        total = sum(request.timings.values()) + files.seconds
        spent = [*request.timings.items(), ("image", files.seconds), ("total", total)]
        timing = [f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in spent]
        warnings = request.params.warnings
        found = {"X-Request-Id": request.id, "Server-Timing": ", ".join(timing)}
        return found | ({"X-Warnings": json.dumps(warnings)} if warnings else {})

    def document(self, request: Request, files: Files) -> ImagesResponse:
        """The response that has all images."""
        return ImagesResponse(
            created=int(time.time()),
            data=[self._image(*one) for one in zip(files.contents, request.params.seeds, files.flagged, strict=True)],
            output_format=self.image_format,
            size=str(request.params.size),
            usage=_usage(request),
        )

    def _image(self, file: bytes, seed: int, flagged: bool | None) -> ImageData:
        text = b64encode(file).decode()
        return ImageData(
            b64_json=None if self.response_format == "url" else text,
            url=None if self.response_format == "b64_json" else f"data:image/{self.image_format};base64,{text}",
            seed=seed,
            nsfw_content_detected=flagged,
        )


class EventWriter:
    """Writes the events of one streamed request."""

    def __init__(self, service: Service, request: Request, reply: Reply) -> None:
        self._service = service
        self._request = request
        self._reply = reply
        self._partial_images = 0  # sent so far

    async def write(self, event: Event) -> bytes:
        """`event` as OpenAI's clients read it; nothing for those that they do not know."""
        match event:
            case Stepped(_, _, (preview, *_)) if self._partial_images < self._reply.partial_images:
                return await self._partial_image(preview)
            case Completed():
                return await self._completed(event)
            case Failed(error):
                return format_sse_event(event="error", data_str=error_document(error).model_dump_json())
        return b""

    async def _partial_image(self, preview: Image) -> bytes:
        reply = self._reply
        index, self._partial_images = self._partial_images, self._partial_images + 1
        file = await run_in_threadpool(images.encode, preview, reply.image_format, quality=reply.quality)
        document = PartialImageEvent(
            type=f"{reply.operation}.partial_image",
            b64_json=b64encode(file).decode(),
            partial_image_index=index,
            created_at=int(time.time()),
            size=str(self._request.params.size),
            output_format=reply.image_format,
        )
        return _event(document.type, document)

    async def _completed(self, event: Completed) -> bytes:
        reply, params = self._reply, self._request.params
        files = await self._service.encode_images(self._request, event, reply.image_format, quality=reply.quality)
        document = CompletedEvent(
            type=f"{reply.operation}.completed",
            b64_json=b64encode(files.contents[0]).decode(),
            created_at=int(time.time()),
            size=str(params.size),
            output_format=reply.image_format,
            usage=_usage(self._request),
            seed=params.seeds[0],
            nsfw_content_detected=files.flagged[0],
        )
        return _event(document.type, document)


def _event(name: str, document: BaseModel) -> bytes:
    return format_sse_event(event=name, data_str=document.model_dump_json())


def _usage(request: Request) -> Usage:
    prompts = [request.params.prompt, request.params.negative_prompt]
    read = prompts if request.params.guided else prompts[:1]
    tokens = sum(len(chunk.ids) for prompt in read for chunk in prompt.chunks)
    return Usage(
        input_tokens=tokens,
        input_tokens_details=TokenDetails(text_tokens=tokens, image_tokens=0),
        output_tokens=0,
        total_tokens=tokens,
    )
