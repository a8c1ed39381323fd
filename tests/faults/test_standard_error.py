"""A server whose standard error is closed, full, or read by nobody serves as any other, and ends as any other."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from engines.demo import BUNDLE
from tests.support.bare_server import wait_until

pytestmark = pytest.mark.faults

MALFORMED = 3000  # requests; the log of 826 of them filled a pipe
LONG_PATH = "/" + "x" * 4000


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def send_malformed(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as caller:
        caller.sendall(b"this is no HTTP\r\n\r\n")
        assert caller.recv(65_536).startswith(b"HTTP/1.1 400")


@contextmanager
def ready_server(redirection: str, bundle: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A ready server with a redirection of the shell, and its port; its pipe, if it has one, is never read."""
    port = free_port()
    command = [sys.executable, "-m", "server", "--bundle", str(bundle), "--port", str(port), "--threads", "1"]
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command, *arguments]
    with subprocess.Popen(shell, stderr=subprocess.PIPE) as process:  # noqa: S603 - our own command
        try:
            wait_until(lambda: process.poll() is not None or is_ready(port))
            assert process.poll() is None, "it ended"
            yield process, port
        finally:
            process.kill()


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/v2/health/ready", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize("redirection", ["", "2>&-", "2>/dev/full"], ids=["unread", "closed", "full"])
def test_it_serves_and_stops(redirection: str) -> None:
    with (
        ready_server(redirection, BUNDLE, "--access-log") as (process, port),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):
        for _ in range(MALFORMED):
            send_malformed(port)
        for _ in range(100):  # access log lines are never left out: these fill a pipe six times
            assert client.get(LONG_PATH).status_code == 404
        assert client.get("/v2/health/live").status_code == 200
        drawn = client.post("/generate", json={"prompt": "a red heart", "num_inference_steps": 2})
        assert drawn.status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)


def test_a_flood_of_malformed_requests_is_a_few_lines() -> None:
    with ready_server("", BUNDLE) as (process, port):
        for _ in range(MALFORMED):
            send_malformed(port)
        process.send_signal(signal.SIGTERM)
        assert process.stderr
        lines = process.stderr.read().splitlines()
    assert len(lines) < MALFORMED / 10
