"""The HTTP server: uvicorn over a listener of our own, and how it ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import uvicorn

from server.access.addresses import is_loopback
from server.startup.application import application, use_libraries
from server.startup.settings import ServerSettings
from server.transport.limits import REFUSALS, Limits, TransportConfig, fit_descriptors

if TYPE_CHECKING:
    from server.api.service import Service


class HttpServer(uvicorn.Server):
    """A server that handles no signals, and closes its connections when it is told to, not by a timer of its own.

    uvicorn cancels the tasks of requests when its timer runs out, who then get 500, and raises signals anew at its end.
    """

    _loop: asyncio.AbstractEventLoop | None = None

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await use_libraries()
        await super().startup(sockets)

    def disconnect(self) -> None:
        """Close all connections, whatever their requests wait for. For any thread."""
        if self._loop:
            with suppress(RuntimeError):  # the loop is closed, and they with it
                self._loop.call_soon_threadsafe(self._abort)

    def _abort(self) -> None:
        for connection in tuple(self.server_state.connections):
            connection.transport.abort()


def make_http_server(service: Service, settings: ServerSettings, listener: socket.socket) -> HttpServer:
    """The server of what arrives at `listener`. Raises KeyFileError."""
    metrics = service.runtime.metrics
    app = application(service, settings, loopback=is_loopback(listener.getsockname()[0]))
    for reason in REFUSALS:
        metrics.declare_rejection(reason)
    limits = Limits(
        connections=fit_descriptors(settings.max_connections),
        header_seconds=settings.header_seconds,
        body_seconds=settings.body_seconds,
        keep_alive_seconds=settings.keep_alive_seconds,
    )
    config = TransportConfig(
        app,
        limits=limits,
        on_refusal=metrics.refused,
        factory=True,
        host=settings.host,
        port=settings.port,
        root_path=settings.root_path,
        forwarded_allow_ips=list(settings.trusted_proxies) or None,
        log_config=None,
        log_level="warning",
        access_log=False,
    )
    return HttpServer(config)


def listen(host: str, port: int) -> socket.socket:
    """Open the listener. Raises OSError."""
    if ":" not in host:
        listener = socket.create_server((host, port))
    else:
        dualstack = socket.has_dualstack_ipv6()
        listener = socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=dualstack)
    # Connections inherit it, and asyncio sets it on none of a listener that it is given: an answer's body would wait,
    # 40 ms on Linux, until the caller has acknowledged the headers. (uvloop sets it on all.)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
