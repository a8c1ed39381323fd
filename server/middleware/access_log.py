"""One log line for every HTTP request; never its body, its query or what was answered."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOGGER = "latentd.access"
_log = logging.getLogger(LOGGER)


class AccessLog:
    """Logs caller, method, path, status, duration and request id once the answer has been sent."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status, request_id = 0, "-"

        async def send_and_note(message: Message) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status = message["status"]
                request_id = dict(message["headers"]).get(b"x-request-id", b"-").decode("latin-1")
            await send(message)

        started = time.perf_counter()
        try:
            return await self._app(scope, receive, send_and_note)
        finally:
            seconds = time.perf_counter() - started
            path = quote(scope["path"])  # without control characters
            _log.info(
                "%s %s %s %s %.3f s, request %s",
                *(_caller(scope), scope["method"], path, status or "unanswered", seconds, request_id),
            )


def _caller(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else "-"
