"""The cheapest HTTP/1.1 client that understands our server: kept connections, a status, a length and a body."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

_STATUS = slice(9, 12)  # of "HTTP/1.1 200 OK"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_BLANK = b"\r\n\r\n"


@dataclass(frozen=True, slots=True)
class WireReply:
    """A response, the seconds it took, and when it was complete."""

    status: int
    body: bytes
    seconds: float
    at: float  # on perf_counter's clock


def post(url: str, fields: dict[str, Any], *, accept: str) -> bytes:
    """A POST request with a JSON body, as it goes over the wire."""
    body = json.dumps(fields).encode()
    head = (
        f"POST {urlsplit(url).path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nAccept: {accept}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def get(url: str) -> bytes:
    """A GET request as it goes over the wire."""
    return f"GET {urlsplit(url).path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n\r\n".encode()


class WireUser(asyncio.Protocol):
    """A connection that sends the next of `requests` as soon as the last is answered, and calls `on_reply` for each."""

    def __init__(self, requests: Iterator[bytes], on_reply: Callable[[WireReply], None]) -> None:
        self._requests, self._on_reply = requests, on_reply
        self._received = bytearray()
        self._expected = 0  # bytes of the response that is being received; 0 until its head is here
        self._sent = 0.0
        self._exhausted = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has the methods, but not the base class
        self._send_next()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._expected:
            self._read_head()
        if self._expected and len(self._received) >= self._expected:
            self._finish_reply()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._exhausted:
            self.done.set_result(None)
        else:
            self.done.set_exception(exc or ConnectionResetError("The server closed a connection during a request."))

    def _send_next(self) -> None:
        if (request := next(self._requests, None)) is None:
            self._exhausted = True
            self._transport.close()
            return
        self._sent = time.perf_counter()
        self._transport.write(request)

    def _read_head(self) -> None:
        if (end := self._received.find(_BLANK)) < 0:
            return
        length = _LENGTH.search(self._received, 0, end)
        self._body = end + len(_BLANK)
        self._expected = self._body + (int(length[1]) if length else 0)

    def _finish_reply(self) -> None:
        now = time.perf_counter()
        status, body = int(self._received[_STATUS]), bytes(self._received[self._body : self._expected])
        del self._received[: self._expected]
        self._expected = 0
        self._on_reply(WireReply(status, body, now - self._sent, now))
        self._send_next()


async def send_all(url: str, requests: Iterator[bytes], on_reply: Callable[[WireReply], None], *, users: int) -> None:
    """Let `users` share the requests, each over its own connection. Raises OSError when a connection is lost."""
    loop, address = asyncio.get_running_loop(), urlsplit(url)
    host, port = address.hostname or "", address.port or 80
    opened = [await loop.create_connection(lambda: WireUser(requests, on_reply), host, port) for _ in range(users)]
    done = [user.done for _, user in opened]
    try:
        await asyncio.gather(*done)
    finally:
        for transport, _ in opened:
            transport.close()
        await asyncio.gather(*done, return_exceptions=True)
