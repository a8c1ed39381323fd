"""One log line for every HTTP request; never its body, its query or what was answered."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOGGER = "latentd.access"
_FACTS = "latentd.access_log"  # key of the scope: what the application has noted of a request
_log = logging.getLogger(LOGGER)


def note(scope: MutableMapping[str, Any], **facts: str) -> None:
    """Have the line of this request state its `caller`, rather than the address, or its `api`."""
    scope.get(_FACTS, {}).update(facts)


class AccessLog:
    """Logs caller, method, path, status, duration, request id and API once the answer has been sent."""

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

        noted: dict[str, str] = {}
        scope[_FACTS] = noted
        started = time.perf_counter()
        try:
            return await self._app(scope, receive, send_and_note)
        finally:
            seconds = time.perf_counter() - started
            fields = {
                "caller": noted.get("caller") or _address(scope),
                "method": scope["method"],
                "path": quote(scope["path"]),  # without control characters
                "status": status or "unanswered",
                "seconds": round(seconds, 3),
                "request_id": request_id,
                **({"api": noted["api"]} if "api" in noted else {}),
            }
            line = "%(caller)s %(method)s %(path)s %(status)s %(seconds).3f s, request %(request_id)s"
            _log.info(line + (", api %(api)s" if "api" in noted else ""), fields, extra={"fields": fields})


def _address(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else "-"
