"""A key is exchanged by the steps of docs/operating/maintenance.md, on a server with requests that go on meanwhile."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from engines.demo import BUNDLE as DEMO
from server.access import keys
from tests.server.access.conftest import client_of
from tests.support.bare_server import wait_until
from tests.support.meeting import HeldServing
from tests.support.serving import Serving

LONG = {"prompt": "a red heart", "num_inference_steps": 200, "seed": 1}


def make_key(file: Path, name: str, *options: str) -> str:
    command = [sys.executable, "-m", "server.access", name, "--file", str(file), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()  # noqa: S603 - ours


def draw(serving: Serving, key: str) -> httpx.Response:
    with client_of(serving, key) as client:
        return client.post("/generate", json=LONG)


def status(serving: Serving, key: str) -> int:
    with client_of(serving, key) as client:
        return client.get("/models").status_code


def remove_first(file: Path, name: str) -> str:
    """Remove the first table of `name`, as an editor does, and return it."""
    head, *tables = file.read_text().split("[[keys]]")
    removed = next(table for table in tables if f'name = "{name}"' in table)
    tables.remove(removed)
    new = file.with_suffix(".edited")
    new.write_text("[[keys]]".join([head, *tables]))
    new.replace(file)
    return removed


def test_a_key_is_exchanged_without_a_restart_or_a_lost_request(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    boss, old = make_key(file, "boss", "--admin"), make_key(file, "alice")
    with (
        HeldServing(DEMO, "--api-keys", str(file)) as serving,
        client_of(serving, boss) as administrator,
        ThreadPoolExecutor(1) as pool,
    ):
        new = make_key(file, "alice")
        assert serving.logged("has changed: it has 3 API keys")
        assert [status(serving, key) for key in (old, new)] == [200, 200]

        with serving.held():
            serving.let(9)
            in_flight = pool.submit(draw, serving, old)
            wait_until(lambda: "latentd_requests_running 1.0" in administrator.get("/metrics").text)
            assert keys.digest(old) in remove_first(file, "alice")
            wait_until(lambda: status(serving, old) == 401)

        assert status(serving, new) == 200
        assert in_flight.result().status_code == 200
        assert 'rejected_total{reason="Unauthenticated"} 0.0' not in administrator.get("/metrics").text
        assert serving.process.poll() is None
