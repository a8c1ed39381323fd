"""Our HTTP protocol over a small application, on a thread of its own; and raw connections to it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from server.transport.limits import Limits, Refusal, TransportConfig

BLOB = bytes(32 * 1024 * 1024)  # more than the kernel buffers


@dataclass
class BareServer:
    """An application with a few paths. `left` names callers that were found gone."""

    limits: Limits
    loop: str
    left: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)  # why requests were, by the transport
    go_on: threading.Event = field(default_factory=threading.Event)
    waiting: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __post_init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        config = TransportConfig(
            self.app,
            limits=self.limits,
            on_refusal=self.refused.append,
            loop=self.loop,
            lifespan="off",
            log_config=None,
            interface="asgi3",
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    def connect(self, *, seconds: float = 8) -> socket.socket:
        return socket.create_connection(self.address, timeout=seconds)

    def stop(self, *, seconds: float = 120) -> None:
        self.server.should_exit = True
        self.thread.join(seconds)
        assert not self.thread.is_alive(), "the server did not stop"

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        await (await self.respond(request))(scope, receive, send)

    async def respond(self, request: Request) -> Response:
        match request.url.path:
            case "/echo":
                return Response(await request.body())
            case "/refuse":
                return PlainTextResponse("no", 413)
            case "/blob":
                return Response(BLOB)
            case "/events" | "/flood" as path:
                events = self.events() if path == "/events" else self.flood()
                return StreamingResponse(events, media_type="text/event-stream")
            case "/wait":
                await request.body()
                return await self.wait(request)
        return PlainTextResponse(request.url.path)

    async def wait(self, request: Request) -> Response:
        """Respond when the test says so, unless the caller leaves before."""
        self.waiting.release()
        leaving = asyncio.ensure_future(request.receive())
        while not self.go_on.is_set() and not leaving.done():
            await asyncio.sleep(0.01)
        if leaving.done():
            self.left.append("wait")
        leaving.cancel()
        return PlainTextResponse("done")

    async def flood(self) -> Any:
        """Events without an end, for readers who are slower."""
        try:
            while True:
                yield b"data: " + bytes(100_000) + b"\n\n"
                await asyncio.sleep(0)
        finally:
            self.left.append("flood")

    async def events(self) -> Any:
        try:
            yield b"data: first\n\n"
            self.waiting.release()
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)
            yield b"data: last\n\n"
        finally:
            if not self.go_on.is_set():
                self.left.append("events")


@contextmanager
def bare_server(limits: Limits | None = None, *, loop: str = "uvloop") -> Iterator[BareServer]:
    server = BareServer(limits or Limits(), loop)
    server.thread.start()
    wait_until(lambda: server.server.started)
    try:
        yield server
    finally:
        server.go_on.set()
        server.stop()


def wait_until(condition: Callable[[], bool], *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def read_all(connection: socket.socket) -> bytes:
    """Everything up to the end of the connection, which may be a reset."""
    received = bytearray()
    while True:
        try:
            piece = connection.recv(65536)
        except ConnectionError:
            return bytes(received)
        if not piece:
            return bytes(received)
        received += piece


def read_until(connection: socket.socket, end: bytes) -> bytes:
    received = bytearray()
    while end not in received:
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    return bytes(received)
