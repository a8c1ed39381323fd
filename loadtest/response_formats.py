"""The ways to request images, of which OpenAI's API is one: what is sent, and how the response is parsed. Pure."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import httpx
from httpx_sse import EventSource

from loadtest.analysis.results import STAGES, Outcome, outcome_of

_MAX_DETAIL = 500  # characters that are kept of an error
_MAX_PAUSE = 5.0  # seconds that a user waits after a refusal
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class BodyPart:
    """A piece of a response's body and when it arrived."""

    at: float  # seconds after the request was sent
    content: bytes


@dataclass(frozen=True, slots=True)
class RawResponse:
    """An HTTP response with the arrival time of each piece of its body."""

    status: int
    headers: Mapping[str, str]  # looked up without regard to case
    parts: Sequence[BodyPart]

    @property
    def content(self) -> bytes:
        return b"".join(part.content for part in self.parts)


@dataclass(frozen=True, slots=True)
class RequestResult:
    """The outcome of a request and what its response says."""

    outcome: Outcome
    status: int | None = None
    retry_after: float | None = None
    detail: str = ""
    stages: dict[str, float] | None = None
    first_step: float | None = None  # seconds after the request was sent; None where the format does not stream steps

    @property
    def pause(self) -> float:
        """Seconds that a user waits before the next request."""
        return 0.0 if self.outcome == "completed" else min(self.retry_after or 1.0, _MAX_PAUSE)


class ResponseFormat(ABC):
    """One way to request images. A subclass gives the path, the Accept header, the body, and the parser."""

    path = "/generate"
    accept: str

    def body(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the JSON body for an entry's fields."""
        return fields

    @abstractmethod
    def read(self, response: RawResponse) -> RequestResult:
        """Parse a response of status 200. Raises ValueError, KeyError or TypeError where a part of it is missing."""

    def parse(self, response: RawResponse) -> RequestResult:
        """Return the outcome of the request that got `response`."""
        if response.status != 200:
            retry_after = _seconds(response.headers.get("retry-after"))
            return RequestResult(outcome_of(response.status), response.status, retry_after, detail_of(response.content))
        try:
            return self.read(response)
        except (ValueError, KeyError, TypeError):
            failed = outcome_of(response.status, whole=False)
            return RequestResult(failed, response.status, detail="the response has no images or no timings")


class JsonFormat(ResponseFormat):
    """A JSON document with images in base64 and timings."""

    accept = "application/json"

    def read(self, response: RawResponse) -> RequestResult:
        return _parse_document(json.loads(response.content))


class PngFormat(ResponseFormat):
    """The bare PNG file; the Server-Timing header has the timings."""

    accept = "image/png"

    def read(self, response: RawResponse) -> RequestResult:
        if not response.content.startswith(_PNG):
            raise ValueError("not a PNG file")
        return _completed(response)


class EventStreamFormat(ResponseFormat):
    """Server-sent events: one for each step, then the JSON document."""

    accept = "text/event-stream"

    def read(self, response: RawResponse) -> RequestResult:
        first_step = None
        for at, name, data in server_sent_events(response.parts):
            match name:
                case "step" if first_step is None:
                    first_step = at
                case "completed":
                    return replace(_parse_document(json.loads(data)), first_step=first_step)
                case "error":
                    status = int(json.loads(data)["status"])
                    return RequestResult(outcome_of(status, whole=False), status, detail=detail_of(data.encode()))
        return RequestResult("failed", response.status, detail="the stream ended without an image or an error")


class OpenAIFormat(ResponseFormat):
    """OpenAI's Images API; the Server-Timing header has the timings."""

    path = "/v1/images/generations"
    accept = "application/json"

    def body(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        renamed = {"n" if name == "num_images" else name: value for name, value in fields.items()}
        return {"response_format": "b64_json", **renamed}

    def read(self, response: RawResponse) -> RequestResult:
        if not json.loads(response.content)["data"]:
            raise ValueError("no images")
        return _completed(response)


FormatName = Literal["json", "png", "events", "openai"]
RESPONSE_FORMATS: dict[FormatName, ResponseFormat] = {
    "json": JsonFormat(),
    "png": PngFormat(),
    "events": EventStreamFormat(),
    "openai": OpenAIFormat(),
}


def detail_of(content: bytes) -> str:
    """Return a problem's `detail`, OpenAI's `message`, or the body itself without one; at most 500 characters."""
    try:
        document = json.loads(content)
        text = document["error"]["message"] if "error" in document else document["detail"]
    except (ValueError, KeyError, TypeError):
        text = content.decode("utf-8", "replace")
    return str(text)[:_MAX_DETAIL]


def server_timing(text: str) -> dict[str, float]:
    """Return the durations of a Server-Timing header by name, in seconds."""
    metrics = [[piece.strip() for piece in metric.split(";")] for metric in text.split(",")]
    found = [(name, value) for name, *values in metrics for value in values if value.startswith("dur=")]
    return {name: float(value.removeprefix("dur=")) / 1000 for name, value in found}


def server_sent_events(parts: Sequence[BodyPart]) -> Iterator[tuple[float, str, str]]:
    """Yield each server-sent event with data: when its last piece arrived, its name and its data."""
    arrived = 0.0

    def body() -> Iterator[bytes]:
        nonlocal arrived
        for part in parts:
            arrived = part.at
            yield part.content

    # httpx-sse decodes lazily: it asks for the next piece once all events of the last are out, so `arrived` is theirs.
    response = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=body())
    for event in EventSource(response).iter_sse():
        if event.data:
            yield arrived, event.event or "message", event.data


def _completed(response: RawResponse) -> RequestResult:
    timings = server_timing(response.headers["server-timing"])
    return RequestResult("completed", response.status, stages={stage: timings[stage] for stage in STAGES})


def _parse_document(document: Mapping[str, Any]) -> RequestResult:
    if not document["images"]:
        raise ValueError("no images")
    stages = {stage: float(document["timings"][stage]) for stage in STAGES}
    return RequestResult("completed", 200, stages=stages)


def _seconds(text: str | None) -> float | None:
    """Return a Retry-After header in seconds; None where it is a date."""
    try:
        return max(float(text or ""), 0.0)
    except ValueError:
        return None
