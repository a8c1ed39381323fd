"""The overhead benchmark: a short run of it, its client on its own, and engines that do nothing."""

from __future__ import annotations

import asyncio
import io
from itertools import repeat
from pathlib import Path
from typing import cast

import numpy as np
import PIL.Image
import pytest
from rich.console import Console

from benchmarks.inprocess import Served
from benchmarks.server import overhead
from benchmarks.server.null_engine import NullDevice, waves
from benchmarks.server.overhead import Overhead, null_server, table
from benchmarks.server.wire import WireReply, get, post, send_all
from engines.demo import BUNDLE as DEMO
from engines.manifest import Manifest


def test_a_short_run_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "overhead.json"
    short = ["--seconds", "0.3", "--warm-up", "0.1", "--runs", "10", "--users", "4", "--steps", "3"]
    assert overhead.main(["--out", str(out), "--rows", "6", "--size", "32x48", *short]) == 0
    found = Overhead.model_validate_json(out.read_bytes())
    (server,) = found.servers
    assert (server.rows, server.size, server.steps) == (6, "32x48", 3)
    assert [full.answer for full in server.full] == ["PNG", "JSON"]
    assert all(full.requests > 0 and full.users == 4 for full in server.full)
    assert {answer: len(spread.values) for answer, spread in server.single.items()} == {"PNG": 10, "JSON": 10}
    assert "--size 32x48" in found.run.command
    assert "requests/s of 3 steps" in capsys.readouterr().out
    for figure in ("intake", "PNG", "batching"):
        assert figure in _text(found)


def test_a_server_that_refuses_ends_the_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main(["--out", str(tmp_path / "none.json"), "--steps", "1000", "--seconds", "0.1"]) == 2
    assert "422" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_engines_that_do_nothing_leave_an_image() -> None:
    with null_server(DEMO) as server:
        (reply,) = _ask(server.url, accept="image/png")
    assert reply.status == 200
    assert np.array_equal(np.asarray(PIL.Image.open(io.BytesIO(reply.body))), waves(64, 64))


def test_they_take_every_step() -> None:
    with Served(DEMO, "onnxruntime", device=NullDevice) as served:
        full = served.saturate(Manifest.read(DEMO).max_rows, repeat(2), seconds=0.1)
    assert len(full.moments) >= 4
    assert served.broken == 0


# --- the client


def test_users_share_what_is_asked() -> None:
    asked = _Answering(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n", b"abc")
    replies = asked(5, 2)
    assert [(reply.status, reply.body) for reply in replies] == [(200, b"abc")] * 5


def test_an_answer_may_come_in_pieces() -> None:
    asked = _Answering(b"HTTP/1.1 429 Too Many Re", b"quests\r\nContent-Length: 4\r\n\r\na", b"bcd")
    replies = asked(2, 1)
    assert [(reply.status, reply.body) for reply in replies] == [(429, b"abcd")] * 2


def test_a_server_that_hangs_up_is_an_error() -> None:
    with pytest.raises(ConnectionError, match="closed a connection"):
        _Answering(b"")(1, 1)


def _ask(url: str, *, accept: str) -> list[WireReply]:
    replies: list[WireReply] = []
    fields: dict[str, str | int] = {"prompt": "a red heart", "num_inference_steps": 2}
    asyncio.run(send_all(url, iter([post(f"{url}/generate", fields, accept=accept)]), replies.append, users=1))
    return replies


class _Answering:
    """A server that answers each request with the same pieces, and its users; with an empty piece it closes."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces
        self._answers: list[asyncio.Task[None]] = []

    def __call__(self, requests: int, users: int) -> list[WireReply]:
        return asyncio.run(self._run(requests, users))

    async def _run(self, requests: int, users: int) -> list[WireReply]:
        replies: list[WireReply] = []
        server = await asyncio.start_server(self._answer, "127.0.0.1")
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            try:
                await send_all(url, iter([get(f"{url}/any")] * requests), replies.append, users=users)
            finally:
                await asyncio.gather(*self._answers)
        return replies

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._answers.append(cast(asyncio.Task[None], asyncio.current_task()))
        while await reader.read(1000):
            for piece in filter(None, self._pieces):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
            if not all(self._pieces):
                break
        writer.close()
        await writer.wait_closed()


def _text(found: Overhead) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(table(found))
    return capture.get()
