"""Responses of server-sent events: one request's events, as its API writes them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT

from server.api.service import Accepted
from server.requests.request import Event

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_KEEPALIVE = 15.0  # seconds


def event_stream(accepted: Accepted, describe: Callable[[Event], Awaitable[bytes]]) -> StreamingResponse:
    """A stream of what `describe` makes of each event; no bytes leave an event out. Closing it cancels the request."""
    headers = {**STREAM_HEADERS, "X-Request-Id": accepted.request.id}
    return StreamingResponse(_events(accepted, describe), media_type="text/event-stream", headers=headers)


async def _events(accepted: Accepted, describe: Callable[[Event], Awaitable[bytes]]) -> AsyncIterator[bytes]:
    try:
        async for event in accepted.event_queue.events(keepalive=_KEEPALIVE):
            if event is None:
                yield KEEPALIVE_COMMENT
            elif content := await describe(event):
                yield content
    finally:
        accepted.request.cancel()  # the caller closed the stream; without effect on a request that has ended
