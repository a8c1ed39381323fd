"""Requests for another host than this are refused: pages that a browser takes for it could read every answer."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.access.hosts import Hosts, name_in
from server.requests.errors import ServerError, UnknownHost

_LONGEST = 100  # characters of a name that a message repeats


class HostCheck:
    """Refuses requests whose `Host` does not name this server. X-Forwarded-Host proves nothing, and is not read."""

    def __init__(self, app: ASGIApp, *, hosts: Hosts, refuse: Callable[[HttpRequest, ServerError], Response]) -> None:
        self._app = app
        self._hosts = hosts
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (reason := self._objection(scope)):
            return await self._refuse(HttpRequest(scope), UnknownHost(reason))(scope, receive, send)
        return await self._app(scope, receive, send)

    def _objection(self, scope: Scope) -> str | None:
        hosts = Headers(scope=scope).getlist("host")
        if not hosts and scope["http_version"] == "1.0":
            return None  # which has none; browsers always send one
        if len(hosts) != 1:
            return "Send one Host header."
        if self._hosts.allow(hosts[0]):
            return None
        name = (name_in(hosts[0]) or "NAME")[:_LONGEST]
        return f"This server does not answer to that Host: its operator can allow it with --allowed-hosts {name}."
