"""The ways to ask a server for a picture: what is sent, and what the answer says. Pure."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loadtest.results import STAGES, Outcome, outcome_of

_DETAIL = 500  # characters that are kept of what went wrong
_LONGEST_PAUSE = 5.0  # seconds that a user who was sent away waits
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer's body, and when it came."""

    at: float  # seconds after the request was sent
    content: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back, as HTTP tells it."""

    status: int
    headers: Mapping[str, str]  # whose names' case does not matter
    parts: Sequence[Part]

    @property
    def content(self) -> bytes:
        return b"".join(part.content for part in self.parts)


@dataclass(frozen=True, slots=True)
class Answer:
    """How a request ended."""

    outcome: Outcome
    status: int | None = None
    retry_after: float | None = None
    detail: str = ""
    stages: dict[str, float] | None = None
    first_step: float | None = None  # seconds after the request was sent; None where the face does not tell

    @property
    def pause(self) -> float:
        """Seconds that a user waits before asking again."""
        return 0.0 if self.outcome == "completed" else min(self.retry_after or 1.0, _LONGEST_PAUSE)


class Face(ABC):
    """One way to ask. A further one says where, what it sends for the fields of a mix, and how it reads the answer."""

    path = "/generate"
    accept: str

    def body(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """The JSON that is sent for an entry's fields."""
        return fields

    @abstractmethod
    def read(self, reply: Reply) -> Answer:
        """What an answer of status 200 says. Raises ValueError, KeyError or TypeError where a part of it is missing."""

    def answer(self, reply: Reply) -> Answer:
        """How the request ended that was answered so."""
        if reply.status != 200:
            retry_after = _number(reply.headers.get("retry-after"))
            return Answer(outcome_of(reply.status), reply.status, retry_after, detail_of(reply.content))
        try:
            return self.read(reply)
        except (ValueError, KeyError, TypeError):
            failed = outcome_of(reply.status, whole=False)
            return Answer(failed, reply.status, detail="the answer has no pictures or no timings")


class Json(Face):
    """A document of pictures and timings."""

    accept = "application/json"

    def read(self, reply: Reply) -> Answer:
        return _document(json.loads(reply.content))


class Png(Face):
    """The bare file; a header tells the timings."""

    accept = "image/png"

    def read(self, reply: Reply) -> Answer:
        if not reply.content.startswith(_PNG):
            raise ValueError("no PNG")
        told = server_timing(reply.headers["server-timing"])
        return Answer("completed", reply.status, stages={stage: told[stage] for stage in STAGES})


class Events(Face):
    """Server-sent events: each step as it is done, then the document."""

    accept = "text/event-stream"

    def read(self, reply: Reply) -> Answer:
        first_step = None
        for at, name, data in server_sent(reply.parts):
            match name:
                case "step" if first_step is None:
                    first_step = at
                case "completed":
                    return replace(_document(json.loads(data)), first_step=first_step)
                case "error":
                    status = int(json.loads(data)["status"])
                    return Answer(outcome_of(status, whole=False), status, detail=detail_of(data))
        return Answer("failed", reply.status, detail="the stream ended, and told neither of a picture nor of an error")


FACES: dict[str, Face] = {"json": Json(), "png": Png(), "events": Events()}


def detail_of(content: bytes) -> str:
    """A problem's own words, or what there is instead."""
    try:
        text = json.loads(content)["detail"]
    except (ValueError, KeyError, TypeError):
        text = content.decode("utf-8", "replace")
    return str(text)[:_DETAIL]


def server_timing(text: str) -> dict[str, float]:
    """Seconds by name, of a Server-Timing header."""
    metrics = [[piece.strip() for piece in metric.split(";")] for metric in text.split(",")]
    found = [(name, value) for name, *values in metrics for value in values if value.startswith("dur=")]
    return {name: float(value.removeprefix("dur=")) / 1000 for name, value in found}


def server_sent(parts: Sequence[Part]) -> Iterator[tuple[float, str, bytes]]:
    """Server-sent events: when each was whole, its name and its data. Comments, which keep lines open, are none."""
    rest = b""
    for part in parts:
        *blocks, rest = (rest + part.content).replace(b"\r\n", b"\n").split(b"\n\n")
        for block in blocks:
            pairs = [line.partition(b":")[::2] for line in block.split(b"\n")]
            name = next((value for field, value in pairs if field == b"event"), b"message").strip()
            data = b"\n".join(value.removeprefix(b" ") for field, value in pairs if field == b"data")
            if data:
                yield part.at, name.decode(), data


def _document(document: Mapping[str, Any]) -> Answer:
    """Of the JSON that holds pictures and timings."""
    if not document["images"]:
        raise ValueError("no pictures")
    stages = {stage: float(document["timings"][stage]) for stage in STAGES}
    return Answer("completed", 200, stages=stages)


def _number(text: str | None) -> float | None:
    """Seconds; None for the dates that Retry-After may also say."""
    try:
        return max(float(text or ""), 0.0)
    except ValueError:
        return None
