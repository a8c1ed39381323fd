"""For Serve's proxies, which answer 500 when an ingress dies: 503, and when to come back.

Each node's Ray is started with `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=latentd_serve.proxy:middlewares`.
"""

from __future__ import annotations

from fastapi import Request as HttpRequest
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentd_serve.forwarding import error_event, starts_stream
from server.api.error_responses import error_response
from server.requests.errors import NotReady

_SOON = 5  # seconds


class AnswerLost:
    """Answers requests that Serve leaves without a response, and ends streams that it leaves without an end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = streams = ended = False

        async def note(message: Message) -> None:
            nonlocal started, streams, ended
            if message["type"] == "http.response.start":
                started, streams = True, starts_stream(message)
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        await self._app(scope, receive, note)
        error = NotReady("The ingress of this request was lost: send the request again.", retry_after=_SOON)
        if not started:
            await error_response(HttpRequest(scope), error)(scope, receive, send)
        elif streams and not ended:
            await send({"type": "http.response.body", "body": error_event(scope["path"], error)})
        return None


def middlewares() -> list[Middleware]:
    """What Serve's proxies wrap around themselves."""
    return [Middleware(AnswerLost)]
