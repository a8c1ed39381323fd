"""The cheapest caller there is: HTTP/1.1 over kept connections, with no more of it than our server's answers need."""

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
class Reply:
    """An answer, and when it was there on perf_counter's clock."""

    status: int
    body: bytes
    seconds: float
    at: float


def post(url: str, fields: dict[str, Any], *, accept: str) -> bytes:
    """A request as it goes over the wire."""
    body = json.dumps(fields).encode()
    head = (
        f"POST {urlsplit(url).path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nAccept: {accept}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def get(url: str) -> bytes:
    """A request as it goes over the wire."""
    return f"GET {urlsplit(url).path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n\r\n".encode()


class User(asyncio.Protocol):
    """Asks again as soon as it is answered, until `asked` is exhausted; `hear` is told of each answer."""

    def __init__(self, asked: Iterator[bytes], hear: Callable[[Reply], None]) -> None:
        self._asked, self._hear = asked, hear
        self._received = bytearray()
        self._whole = 0  # bytes of the answer under way; 0 until its head is here
        self._sent = 0.0
        self._satisfied = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods alone
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._whole:
            self._read_head()
        if self._whole and len(self._received) >= self._whole:
            self._answered()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._satisfied:
            self.done.set_result(None)
        else:
            self.done.set_exception(exc or ConnectionResetError("The server hung up in the middle of a request."))

    def _ask(self) -> None:
        if (request := next(self._asked, None)) is None:
            self._satisfied = True
            self._transport.close()
            return
        self._sent = time.perf_counter()
        self._transport.write(request)

    def _read_head(self) -> None:
        if (end := self._received.find(_BLANK)) < 0:
            return
        length = _LENGTH.search(self._received, 0, end)
        self._body = end + len(_BLANK)
        self._whole = self._body + (int(length[1]) if length else 0)

    def _answered(self) -> None:
        now = time.perf_counter()
        status, body = int(self._received[_STATUS]), bytes(self._received[self._body : self._whole])
        del self._received[: self._whole]
        self._whole = 0
        self._hear(Reply(status, body, now - self._sent, now))
        self._ask()


async def ask(url: str, asked: Iterator[bytes], hear: Callable[[Reply], None], *, users: int) -> None:
    """Let `users` share what is asked, each with a connection of its own. Raises OSError where one is lost."""
    loop, where = asyncio.get_running_loop(), urlsplit(url)
    host, port = where.hostname or "", where.port or 80
    made = [await loop.create_connection(lambda: User(asked, hear), host, port) for _ in range(users)]
    ends = [user.done for _, user in made]
    try:
        await asyncio.gather(*ends)
    finally:
        for transport, _ in made:
            transport.close()
        await asyncio.gather(*ends, return_exceptions=True)
