"""Callers who count their own answers: each request has exactly one, whatever becomes of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import httptools

Ending = Literal[
    "completed", "refused", "cancelled", "unavailable", "invalid", "failed", "left", "disconnected", "unreachable"
]

JSON, EVENTS = "application/json", "text/event-stream"
_STATUSES: Mapping[int, Ending] = {200: "completed", 429: "refused", 499: "cancelled", 503: "unavailable"}
_TIMEOUT = 120.0  # seconds; a request that hangs is a fault, and ends as "disconnected"


@dataclass(frozen=True, slots=True)
class Answer:
    """How one request ended for its caller."""

    ending: Ending
    seconds: float
    status: int = 0  # 0 where none was received
    retry_after: float | None = None
    body: bytes = b""


@dataclass(slots=True)
class Tally:
    """What the callers of a server have seen. `sent` counts requests, `answers` how they ended."""

    sent: int = 0
    answers: list[Answer] = field(default_factory=list)

    @property
    def endings(self) -> Counter[Ending]:
        return Counter(answer.ending for answer in self.answers)

    def seconds(self, ending: Ending) -> list[float]:
        """The seconds of the answers of one kind, from the shortest on."""
        return sorted(answer.seconds for answer in self.answers if answer.ending == ending)


class Caller:
    """One client of the server at `url`, from a source address of its own or with an API key. Each request has a
    connection of its own.

    The response is parsed by httptools: clients with connection pools take more of the CPU than the server does when
    hundreds of requests are open, and would decide what is measured.
    """

    def __init__(self, url: str, tally: Tally, *, source: str = "127.0.0.1", key: str | None = None) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._tally, self._source = tally, source
        self._credentials = "" if key is None else f"Authorization: Bearer {key}\r\n"

    async def ask(self, fields: Mapping[str, Any], *, accept: str = JSON, leave_after: float | None = None) -> Answer:
        """Send one request and count its answer. With `leave_after`, disconnect after so many seconds."""
        self._tally.sent += 1
        began = time.perf_counter()
        reply = _Reply()
        limit = _TIMEOUT if leave_after is None else leave_after
        try:
            async with asyncio.timeout(limit):
                await self._exchange(self._request(fields, accept), reply)
            ending = _ending(reply, accept)
        except TimeoutError:
            ending = "disconnected" if leave_after is None else "left"
        except ConnectionRefusedError:
            ending = "unreachable"
        except (OSError, httptools.HttpParserError):
            ending = "disconnected"
        answer = Answer(ending, time.perf_counter() - began, reply.status, reply.retry_after, bytes(reply.body))
        self._tally.answers.append(answer)
        return answer

    def _request(self, fields: Mapping[str, Any], accept: str) -> bytes:
        body = json.dumps(fields).encode()
        head = (
            f"POST /generate HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nAccept: {accept}\r\n{self._credentials}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def _exchange(self, request: bytes, reply: _Reply) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port, local_addr=(self._source, 0))
        try:
            writer.write(request)
            parser = httptools.HttpResponseParser(reply)
            while not reply.is_whole and (data := await reader.read(2**16)):
                parser.feed_data(data)
                reply.status = parser.get_status_code()
        finally:
            writer.close()


class _Reply:
    """What httptools' parser has read of a response."""

    def __init__(self) -> None:
        self.status = 0
        self.retry_after: float | None = None
        self.body = bytearray()
        self.is_whole = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self.retry_after = float(value)

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.is_whole = True


async def ask_patiently(caller: Caller, fields: Mapping[str, Any], *, tries: int) -> Answer:
    """Ask until it is answered with a picture, waiting as `Retry-After` says after a refusal."""
    answer = await caller.ask(fields)
    for _ in range(tries - 1):
        if answer.ending != "refused":
            break
        await asyncio.sleep(answer.retry_after or 1.0)
        answer = await caller.ask(fields)
    return answer


async def ask_greedily(caller: Caller, fields: Mapping[str, Any], *, until: asyncio.Event, pause: float) -> None:
    """Ask again and again, heeding no `Retry-After`; `pause` seconds keep this process from taking the CPU."""
    while not until.is_set():
        await caller.ask(fields)
        await asyncio.sleep(pause)


def _ending(reply: _Reply, accept: str) -> Ending:
    if not reply.is_whole:
        return "disconnected"
    if reply.status == 200 and accept == EVENTS:
        return _ending_of_stream(bytes(reply.body))
    return _STATUSES.get(reply.status) or ("invalid" if 400 <= reply.status < 500 else "failed")


def _ending_of_stream(body: bytes) -> Ending:
    """The ending that the last event tells; a stream without one was cut."""
    name, _, rest = body.rpartition(b"event: ")[2].partition(b"\n")
    if name == b"completed":
        return "completed"
    if name == b"error":
        status = int(json.loads(rest.partition(b"data: ")[2].partition(b"\n")[0])["status"])
        return _STATUSES.get(status) or "failed"
    return "disconnected"
