"""ASGI applications called in this process, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send


def call(
    app: ASGIApp, method: str, path: str, *, root_path: str = "", headers: Mapping[str, str] | None = None
) -> httpx.Response:
    """One request. As uvicorn does, `root_path` is put before `path`."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, root_path + path, headers=headers)

    return asyncio.run(send())


def scope_teller(*keys: str) -> ASGIApp:
    """Answers with the values of the scope under `keys`."""
    return answering(lambda request: {key: request.scope.get(key) for key in keys})


def answering(answer: Callable[[Request], Any], headers: Mapping[str, str] | None = None) -> ASGIApp:
    """Answers each request with a JSON document."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse(answer(Request(scope)), headers=headers)(scope, receive, send)

    return app
