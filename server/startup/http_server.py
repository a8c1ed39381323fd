"""The HTTP server: uvicorn over a listener of our own, and how it ends."""

from __future__ import annotations

import asyncio
import codecs
import logging
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import uvicorn

from server.access.addresses import is_loopback
from server.access.hosts import Hosts, hosts_to_answer
from server.access.key_file import KeyFile
from server.startup.settings import ServerSettings
from server.transport.limits import REFUSALS, Limits, TransportConfig, fit_descriptors

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from server.api.service import Service

_log = logging.getLogger(__name__)
_OPEN = (
    "There are no API keys, and --host lets other machines connect: everyone who can may generate images and read "
    "/metrics. Give --api-keys FILE (`python -m server.access NAME --file FILE` makes a key), or let a proxy ask."
)


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
        await _use_first()
        await super().startup(sockets)

    def disconnect(self) -> None:
        """Close all connections, whatever their requests wait for. For any thread."""
        if self._loop:
            with suppress(RuntimeError):  # the loop is closed, and they with it
                self._loop.call_soon_threadsafe(self._abort)

    def _abort(self) -> None:
        for connection in tuple(self.server_state.connections):
            connection.transport.abort()


async def _use_first() -> None:
    """Load what libraries import at first use, by using it: a request must not fail because an import does."""
    from PIL import Image  # noqa: PLC0415 - while the engines are loaded
    from starlette.concurrency import run_in_threadpool  # noqa: PLC0415 - as above

    codecs.lookup("utf-16-be")  # of the comment in EXIF
    await run_in_threadpool(Image.preinit)  # the formats of uploads, and the threads that decode them


def make_http_server(service: Service, settings: ServerSettings, listener: socket.socket) -> HttpServer:
    """The server of what arrives at `listener`. Raises KeyFileError."""
    metrics = service.runtime.metrics
    keys = None if settings.api_keys is None else KeyFile(settings.api_keys)
    loopback = is_loopback(listener.getsockname()[0])
    if keys is not None:
        keys.watch()
    elif not loopback:
        _log.warning("%s", _OPEN)
    for reason in REFUSALS:
        metrics.declare_rejection(reason)
    limits = Limits(
        connections=fit_descriptors(settings.max_connections),
        header_seconds=settings.header_seconds,
        body_seconds=settings.body_seconds,
        keep_alive_seconds=settings.keep_alive_seconds,
    )
    config = TransportConfig(
        partial(_app, service, settings, keys, hosts_to_answer(settings.allowed_hosts, loopback=loopback)),
        limits=limits,
        on_refusal=metrics.refused,
        factory=True,
        host=settings.host,
        port=settings.port,
        root_path=settings.root_path,
        log_config=None,
        log_level="warning",
        access_log=False,
    )
    return HttpServer(config)


def _app(service: Service, settings: ServerSettings, keys: KeyFile | None, hosts: Hosts | None) -> ASGIApp:
    from server.app import Access, make_app  # noqa: PLC0415 - a fifth of the start, while the engines are loaded

    access = Access(find=keys.find if keys else None, hosts=hosts, origins=settings.allowed_origins)
    return make_app(service, access, access_log=settings.access_log or settings.log_level == "debug")


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
