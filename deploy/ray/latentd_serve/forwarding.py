"""An HTTP request as the ingress forwards it to a replica, and how a replica answers it with an ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Self

from starlette.types import ASGIApp, Message, Scope

from server.api.native.documents import event
from server.api.openai.errors import error_document
from server.api.problems import problem
from server.requests.errors import ServerError

_EVENTS = b"text/event-stream"
_CANCEL_SECONDS = 5.0  # in which an application notices that its caller is gone


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request needs that some replicas hold. Read without parsing, so it decides nothing but the replica."""

    model: str = ""  # "" is the default model
    loras: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardedRequest:
    """A request with its whole body."""

    scope: dict[str, Any]  # of ASGI
    body: bytes
    wanted: Wanted = Wanted()
    lost: str = ""  # the replica that died with it: for a while others may not know that

    @classmethod
    def of(cls, scope: Scope, body: bytes, wanted: Wanted) -> Self:
        return cls(scope={key: scope[key] for key in _SCOPE if key in scope}, body=body, wanted=wanted)


_SCOPE = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
    "client",
    "server",
)


def error_event(path: str, error: ServerError) -> bytes:
    """The event that ends a stream of the API at `path`."""
    return event("error", error_document(error) if path.startswith("/v1/") else problem(error))


def starts_stream(message: Message) -> bool:
    """Whether `http.response.start` begins a stream of events, which is passed on event by event."""
    return any(name.lower() == b"content-type" and value.startswith(_EVENTS) for name, value in message["headers"])


async def respond(app: ASGIApp, request: ForwardedRequest) -> AsyncGenerator[list[Message]]:
    """What `app` sends: a stream of events as it comes, and any other response as a whole.

    Closing the iterator disconnects the caller.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    caller = _Caller(request.body)
    answering = asyncio.create_task(_run(app, request, caller, sent))
    try:
        waiting: list[Message] = []
        streams = False
        while message := await sent.get():
            streams = streams or (message["type"] == "http.response.start" and starts_stream(message))
            waiting.append(message)
            if streams and message["type"] == "http.response.body":
                yield waiting
                waiting = []
        if waiting:
            yield waiting
    finally:
        await _end(answering, caller)


async def _run(app: ASGIApp, request: ForwardedRequest, caller: _Caller, sent: asyncio.Queue[Message | None]) -> None:
    try:
        await app(dict(request.scope), caller.receive, sent.put)
    finally:
        sent.put_nowait(None)


async def _end(answering: asyncio.Task[None], caller: _Caller) -> None:
    """Let the application notice that its caller is gone; it has released what it held when this returns."""
    caller.disconnect()
    await asyncio.wait([answering], timeout=_CANCEL_SECONDS)
    if not answering.done():
        answering.cancel()
    elif not answering.cancelled():
        answering.exception()  # the application has logged it


class _Caller:
    """The caller, as an application receives it."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._gone = asyncio.Event()

    def disconnect(self) -> None:
        self._gone.set()

    async def receive(self) -> Message:
        body, self._body = self._body, None
        if body is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}
