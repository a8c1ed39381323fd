"""What Serve's proxies answer when an ingress dies."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import httpx
from latentd_serve.proxy import middlewares
from starlette.types import Message, Receive, Scope, Send

_STREAM: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


def _ask(*messages: Message) -> httpx.Response:
    """What a caller gets of a proxy that sends so much of a response."""

    async def proxy(_scope: Scope, _receive: Receive, send: Send) -> None:
        for message in messages:
            await send(dict(message))

    async def ask() -> httpx.Response:
        app: Any = proxy
        for one in middlewares():
            app = cast(Any, one.cls)(app)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get("/generate")

    return asyncio.run(ask())


def test_a_request_without_a_response_gets_503_and_when_to_come_back() -> None:
    answer = _ask()
    assert (answer.status_code, answer.json()["status"]) == (503, 503)
    assert int(answer.headers["retry-after"]) >= 5


def test_a_stream_without_an_end_gets_an_error_event() -> None:
    answer = _ask(_STREAM, {"type": "http.response.body", "body": b"event: step\n\n", "more_body": True})
    assert answer.text.startswith("event: step\n\nevent: error\ndata: ")


def test_other_responses_pass_unchanged() -> None:
    answer = _ask(_STREAM, {"type": "http.response.body", "body": b"event: completed\n\n"})
    assert answer.text == "event: completed\n\n"
