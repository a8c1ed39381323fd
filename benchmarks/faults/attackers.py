"""What hostile and broken clients do to a server, each bounded in count and time.

python -m benchmarks.faults.attackers NAME URL    runs one attack from a process of its own; prints JSON
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
from pydantic import Field

from benchmarks.faults.callers import EVENTS, Caller, Tally, ask_greedily, ask_patiently
from loadtest.provenance import ResultModel

_KIBI, _MEBI = 2**10, 2**20
_PIECE = 256 * _KIBI  # bytes that are sent at once,
_PAUSE = 0.002  # and seconds until the next piece: the attacker is to take less of the CPU than the server
SHORT = {"prompt": "a red heart on a yellow background", "num_inference_steps": 4, "seed": 1}
_LONG = {**SHORT, "num_inference_steps": 200, "preview_every": 1}
_STATUS = slice(9, 12)  # of "HTTP/1.1 200 OK"


@dataclass(slots=True)
class Damage:
    """What an attack saw: statuses of its answers ("closed" without one, "open" where it gave up), and a tally."""

    answers: Counter[str] = field(default_factory=Counter)
    tally: Tally = field(default_factory=Tally)
    polite: list[float] = field(default_factory=list)  # seconds until a well-behaved caller beside it had its picture


class AttackReport(ResultModel):
    """What an attacker's process prints."""

    answers: dict[str, int]
    refusals: list[float] = Field(description="seconds of each refusal")
    polite: list[float]


@dataclass(frozen=True, slots=True)
class Target:
    """The server that is attacked."""

    url: str

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 80

    def head(self, length: int, *, accept: str = "application/json") -> bytes:
        """A request to generate whose body has `length` bytes."""
        host, port = self.address
        lines = (
            "POST /generate HTTP/1.1",
            f"Host: {host}:{port}",
            f"Accept: {accept}",
            "Content-Type: application/json",
            f"Content-Length: {length}",
        )
        return "\r\n".join((*lines, "", "")).encode()


async def exchange(target: Target, pieces: Iterable[bytes], *, seconds: float, pause: float = _PAUSE) -> str:
    """Send `pieces` over a new connection and return the status of the answer, or how the connection ended."""
    writer = None
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(*target.address)
            with suppress(OSError):  # an answer may have come although the server reads no more
                for piece in pieces:
                    if reader.at_eof() or reader._buffer:  # type: ignore[attr-defined]
                        break
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(pause)
            return (await reader.readline())[_STATUS].decode("ascii", "replace") or "closed"
    except TimeoutError:
        return "open"
    except OSError:
        return "closed"
    finally:
        if writer:
            writer.close()


async def header_flood(target: Target, damage: Damage) -> None:
    """A header of 64 MiB, in large pieces and in small ones."""
    start = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Flood: "
    for size, count in ((_PIECE, 256), (_KIBI, 4096)):
        pieces = [start, *[b"a" * size] * count]
        damage.answers[await exchange(target, pieces, seconds=60, pause=0)] += 1


async def invalid_base64(target: Target, damage: Damage) -> None:
    """Bodies of 33 MiB whose picture is no base64: eight, two at a time."""
    body = json.dumps({**SHORT, "image": "!" * (33 * _MEBI)}).encode()
    for _ in range(4):
        await _post_bodies(target, damage, body, count=2)


async def large_bodies(target: Target, damage: Damage) -> None:
    """Valid bodies of 30 MiB, an image and a mask: 120 at once."""
    half = noisy_picture(15 * _MEBI)
    await _post_bodies(target, damage, json.dumps({**SHORT, "image": half, "mask": half}).encode(), count=120)


async def endless_body(target: Target, damage: Damage) -> None:
    """A chunked body that does not end: the server must hang up soon after its bound."""
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n%s\r\n" % (_PIECE, b" " * _PIECE)
    damage.answers[await exchange(target, [head, *[chunk] * 4096], seconds=60)] += 1


async def silent_connections(target: Target, damage: Damage) -> None:
    """Connections that send nothing, half a header, or half a body: 150 of each. Those still open after 45 s count."""
    starts = (b"", b"POST /generate HTTP/1.1\r\nHost: localhost\r\nX-Slow: a", target.head(1000) + b'{"prompt": "')
    pieces = [[start] if start else [] for start in starts for _ in range(150)]
    answers = await asyncio.gather(*(exchange(target, one, seconds=45) for one in pieces))
    damage.answers.update(answers)


async def slowloris(target: Target, damage: Damage) -> None:
    """A hundred connections that send a header of one line a second, for 45 s."""

    def lines() -> Iterable[bytes]:
        yield b"POST /generate HTTP/1.1\r\nHost: localhost\r\n"
        yield from (b"X-%d: a\r\n" % number for number in range(45))

    answers = await asyncio.gather(*(exchange(target, lines(), seconds=45, pause=1.0) for _ in range(100)))
    damage.answers.update(answers)


async def slow_readers(target: Target, damage: Damage) -> None:
    """Twenty event streams with previews of which nobody reads more than the first bytes, for 20 s."""
    body = json.dumps(_LONG).encode()

    async def read_slowly() -> str:
        reader, writer = await asyncio.open_connection(*target.address, limit=_KIBI)
        writer.write(target.head(len(body), accept=EVENTS) + body)
        status = (await reader.readline())[_STATUS].decode("ascii", "replace") or "closed"
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(20)
        writer.close()
        return status

    damage.answers.update(await asyncio.gather(*(read_slowly() for _ in range(20))))


async def malformed_flood(target: Target, damage: Damage) -> None:
    """Four thousand requests that are no HTTP, no JSON, or not valid: a log that grows with them fills a pipe."""
    body = b"{]"
    texts = (b"NONSENSE\r\n\r\n", target.head(len(body)) + body, target.head(3) + b'{"}', b"GET /\x00 HTTP/1.1\r\n\r\n")
    for _ in range(500):
        answers = await asyncio.gather(*(exchange(target, [text], seconds=30, pause=0) for text in texts * 2))
        damage.answers.update(answers)


async def burst(target: Target, damage: Damage) -> None:
    """Ten times what the server takes (its queue and its batch), at once, three times."""
    caller = Caller(target.url, damage.tally)
    for _ in range(3):
        await asyncio.gather(*(caller.ask({**SHORT, "seed": seed}) for seed in range(160)))


async def overload(target: Target, damage: Damage) -> None:
    """A hundred requests a second for 20 s, about ten times what one thread completes of these."""
    caller = Caller(target.url, damage.tally)
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(2000):
            group.create_task(caller.ask({**SHORT, "num_inference_steps": 20, "seed": number}))
            await asyncio.sleep(max(began + number / 100 - time.perf_counter(), 0))


async def greedy_beside_polite(target: Target, damage: Damage) -> None:
    """Two hundred connections that retry at once, beside one from another address that asks for ten pictures."""
    over = asyncio.Event()
    greedy, polite = Caller(target.url, damage.tally), Caller(target.url, Tally(), source="127.0.0.2")
    async with asyncio.TaskGroup() as group:
        for _ in range(200):
            group.create_task(ask_greedily(greedy, SHORT, until=over, pause=1.0))
        await asyncio.sleep(2)
        for _ in range(10):
            began = time.perf_counter()
            await ask_patiently(polite, SHORT, tries=50)
            damage.polite.append(time.perf_counter() - began)
        over.set()


def noisy_picture(size: int) -> str:
    """A PNG file that has about `size` bytes as base64."""
    side = int((size * 3 / 4 / 3) ** 0.5)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return base64.b64encode(file.getvalue()).decode()


async def _post_bodies(target: Target, damage: Damage, body: bytes, *, count: int) -> None:
    pieces = [target.head(len(body)), *(body[at : at + _PIECE] for at in range(0, len(body), _PIECE))]
    answers = await asyncio.gather(*(exchange(target, pieces, seconds=120) for _ in range(count)))
    damage.answers.update(answers)


ATTACKS: dict[str, Callable[[Target, Damage], Coroutine[Any, Any, None]]] = {
    attack.__name__: attack
    for attack in (
        burst,
        overload,
        greedy_beside_polite,
        header_flood,
        invalid_base64,
        large_bodies,
        endless_body,
        silent_connections,
        slowloris,
        slow_readers,
        malformed_flood,
    )
}


def main(name: str, url: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    os.nice(5)  # where cores are few, the server goes first
    damage = Damage()
    asyncio.run(ATTACKS[name](Target(url), damage))
    answers = damage.answers + Counter(damage.tally.endings)
    report = AttackReport(answers=answers, refusals=damage.tally.seconds("refused"), polite=damage.polite)
    sys.stdout.write(report.model_dump_json())


if __name__ == "__main__":
    main(*sys.argv[1:])
