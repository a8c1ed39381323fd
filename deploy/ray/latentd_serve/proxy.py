"""For Serve's proxies, which answer 500 when an ingress dies: 503, and when to come back.

Each node's Ray is started with `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=latentd_serve.proxy:middlewares`.
"""

from __future__ import annotations

from fastapi import Request as HttpRequest
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.error_responses import error_response
from server.requests.errors import NotReady

_SOON = 5  # seconds


class AnswerLost:
    """Answers requests that Serve leaves without a response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        await self._app(scope, receive, note)
        if scope["type"] == "http" and not started:
            error = NotReady("The ingress of this request was lost: send the request again.", retry_after=_SOON)
            await error_response(HttpRequest(scope), error)(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve's proxies wrap around themselves."""
    return [Middleware(AnswerLost)]
