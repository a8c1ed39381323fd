"""Wait for the outcome of a request on behalf of its caller."""

from __future__ import annotations

import asyncio

from fastapi import Request as HttpRequest

from server.api.service import Accepted
from server.requests.request import Outcome, Request


async def wait_for_outcome(accepted: Accepted, http: HttpRequest) -> Outcome:
    """Wait for the outcome; cancel the request at once if the caller disconnects."""
    request = accepted.request
    watcher = asyncio.ensure_future(_cancel_on_disconnect(request, http))
    try:
        return await accepted.event_queue.outcome()
    finally:
        watcher.cancel()
        request.cancel()  # without effect on a request that has ended


async def _cancel_on_disconnect(request: Request, http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    request.cancel()
