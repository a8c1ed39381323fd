"""Bytes that are no HTTP, or nearly: never a 5xx, nothing is smuggled, and connections are closed."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from tests.faults.watching import watched

_SEED, _CASES, _AT_ONCE = 20, 600, 16
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")
_VALID = b'{"prompt": "a red heart", "num_inference_steps": 1, "seed": 1}'
_SMUGGLED = b"GET /models HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

# Requests whose end two parsers may see in different places: one answer at most, and then the connection ends.
SMUGGLING = {
    "length and chunks": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + _SMUGGLED,
    "chunks and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + _SMUGGLED,
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 40\r\n\r\n{}" + _SMUGGLED,
    "a list of lengths": POST + b"Content-Length: 2, 40\r\n\r\n{}" + _SMUGGLED,
    "a signed length": POST + b"Content-Length: +2\r\n\r\n{}" + _SMUGGLED,
    "a negative length": POST + b"Content-Length: -2\r\n\r\n{}" + _SMUGGLED,
    "an endless length": POST + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n{}" + _SMUGGLED,
    "chunks that are not": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + _SMUGGLED,
    "a space before the colon": POST + b"Content-Length : 2\r\n\r\n{}" + _SMUGGLED,
    "a folded header": POST + b"Content-Length:\r\n 2\r\n\r\n{}" + _SMUGGLED,
    "a bare line feed": POST.replace(b"\r\n", b"\n") + b"Content-Length: 2\n\n{}" + _SMUGGLED,
    "a NUL in a header": POST + b"X: a\x00b\r\nContent-Length: 2\r\n\r\n{}" + _SMUGGLED,
    "a NUL in the path": b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n" + _SMUGGLED,
    "a bad chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n" + _SMUGGLED,
    "an endless chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n{}" + _SMUGGLED,
}


@dataclass(frozen=True)
class Heard:
    """What a connection received, and whether the server closed it."""

    received: bytes
    closed: bool

    @property
    def statuses(self) -> list[int]:
        return [int(status) for status in _STATUS.findall(self.received)]


async def heard_after(url: str, pieces: list[bytes], *, seconds: float) -> Heard:
    """Send `pieces`, and listen until the server closes the connection or nothing more is to come."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    received, closed = bytearray(), False
    try:
        async with asyncio.timeout(seconds):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            while data := await reader.read(2**16):
                received += data
            closed = True
    except TimeoutError:
        pass
    except ConnectionError:
        closed = True
    finally:
        writer.close()
    return Heard(bytes(received), closed)


def fuzzed(dice: random.Random) -> list[bytes]:
    """One connection's bytes, in pieces: noise, or a request that is damaged somewhere and split anywhere."""
    whole = dice.choice((noise, damaged, chunked, extended, pipelined))(dice)
    cuts = sorted(dice.randrange(len(whole) + 1) for _ in range(dice.randrange(5)))
    return [whole[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def noise(dice: random.Random) -> bytes:
    return dice.randbytes(dice.randrange(1, 4096))


def damaged(dice: random.Random) -> bytes:
    """A valid request with a few bytes replaced, removed or repeated."""
    request = bytearray(POST + b"Content-Length: %d\r\n\r\n" % len(_VALID) + _VALID)
    for _ in range(dice.randrange(1, 6)):
        at = dice.randrange(len(request))
        request[at : at + dice.randrange(3)] = dice.choice((b"", b"\x00", b"\n", b"\r", b" ", dice.randbytes(2)))
    return bytes(request)


def chunked(dice: random.Random) -> bytes:
    """Chunks whose sizes are sometimes wrong."""
    sizes = (b"%x" % len(_VALID), b"-1", b"0x10", b"", b"g", b"%x" % dice.randrange(2**40), b" 3e")
    return POST + b"Transfer-Encoding: chunked\r\n\r\n" + dice.choice(sizes) + b"\r\n" + _VALID + b"\r\n0\r\n\r\n"


def extended(dice: random.Random) -> bytes:
    """Chunk extensions and trailers of up to a megabyte."""
    filler = b"a" * dice.randrange(2**20)
    size = b"%x" % len(_VALID)
    if dice.random() < 0.5:
        return POST + b"Transfer-Encoding: chunked\r\n\r\n" + size + b";" + filler + b"\r\n" + _VALID + b"\r\n0\r\n\r\n"
    return (
        POST + b"Transfer-Encoding: chunked\r\n\r\n" + size + b"\r\n" + _VALID + b"\r\n0\r\nX: " + filler + b"\r\n\r\n"
    )


def pipelined(dice: random.Random) -> bytes:
    """Several requests at once, of which one is not HTTP."""
    requests = [b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"] * dice.randrange(1, 20)
    requests.insert(dice.randrange(len(requests) + 1), dice.randbytes(20) + b"\r\n\r\n")
    return b"".join(requests)


def batches(cases: list[list[bytes]]) -> Iterator[list[list[bytes]]]:
    yield from (cases[at : at + _AT_ONCE] for at in range(0, len(cases), _AT_ONCE))


def test_no_bytes_are_answered_with_a_5xx() -> None:
    dice = random.Random(_SEED)
    cases = [fuzzed(dice) for _ in range(_CASES)]

    async def send_all(url: str) -> list[Heard]:
        found = []
        for batch in batches(cases):
            found += await asyncio.gather(*(heard_after(url, case, seconds=1.0) for case in batch))
        return found

    with watched() as one:
        before = one.serving.total("latentd_requests_total", api="generate", outcome="completed")
        found = asyncio.run(send_all(one.url))
        completed = int(one.serving.total("latentd_requests_total", api="generate", outcome="completed") - before)
        one.count("completed", completed)
        one.count("left", _CASES - completed)
        statuses = {status for heard in found for status in heard.statuses}
        assert not {status for status in statuses if status >= 500}
        assert {200, 400} <= statuses, "nothing got through, or nothing was refused: this proves nothing"
        told_to_close = [heard for heard in found if b"connection: close" in heard.received.lower()]
        assert told_to_close
        assert all(heard.closed for heard in told_to_close)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with watched() as one:
        yield one.url


@pytest.mark.parametrize("name", SMUGGLING)
def test_nothing_is_smuggled_behind_a_request(name: str, url: str) -> None:
    heard = asyncio.run(heard_after(url, [SMUGGLING[name]], seconds=10))
    assert len(heard.statuses) <= 1
    assert all(400 <= status < 500 or status == 501 for status in heard.statuses)
    assert heard.closed
