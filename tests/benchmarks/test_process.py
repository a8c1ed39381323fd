"""Child processes: how servers are started and ended, what is said when one does not start, and memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks import process
from benchmarks.process import (
    ChildProcess,
    ServerProcess,
    ServerStartError,
    failure_reason,
    free_port,
    memory_of,
    server_command,
)
from engines.demo import BUNDLE as DEMO

_MIB = 2**20
_HOLD = f"held = bytearray(50 * {_MIB}); held[::4096] = bytes([1]) * len(held[::4096]); print(flush=True); input()"
_SPAWN = "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- servers


def test_our_server_is_ready_on_entry_and_gone_on_exit() -> None:
    with ServerProcess(server_command("--bundle", str(DEMO), "--threads", "1"), sample_memory=True) as server:
        assert httpx.get(f"{server.url}/v2/health/ready").status_code == 200
        assert server.ready_after > 0
        assert server.cpu_seconds() > 0
        log = server.log
    assert not psutil.pid_exists(server.pid)
    assert server.peak_memory > 50 * _MIB
    assert not log.exists()


def test_a_server_that_logs_no_address_is_asked_at_its_port(tmp_path: Path) -> None:
    (tmp_path / "v2" / "health").mkdir(parents=True)
    (tmp_path / "v2" / "health" / "ready").write_text("yes")
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    with ServerProcess(command, port=port, folder=tmp_path, log=tmp_path / "log") as server:
        assert httpx.get(f"{server.url}/v2/health/ready").text == "yes"
    assert "/v2/health/ready" in (tmp_path / "log").read_text()


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "server.log"
    with (
        pytest.raises(ServerStartError, match="exit code 1: no such model"),
        ServerProcess(python("import sys; sys.exit('no such model')"), log=log),
    ):
        pytest.fail("it never was ready")
    assert "no such model" in log.read_text()


def test_a_server_that_never_gets_ready_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "START_SECONDS", 0.5)
    server = ServerProcess(python("import time; time.sleep(60)"), port=free_port())
    with pytest.raises(ServerStartError, match=r"not ready after 0\.5 s"):
        server.__enter__()
    assert server.exit_code is not None


# --- processes


def test_children_that_outlive_their_parent_are_ended(tmp_path: Path) -> None:
    code = f"{_SPAWN}; print(child.pid, flush=True)"
    with ChildProcess(python(code), log=tmp_path / "log", interactive=True) as child:
        orphan = int(child.read_line(timeout=30))
        until(lambda: child.exit_code is not None)
    until(lambda: ended(orphan))
    assert ended(orphan)


def ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_lines_go_both_ways_until_it_ends(tmp_path: Path) -> None:
    echo = "import os; print(input().upper(), os.environ['WHO'], flush=True); input(); print('never')"
    with ChildProcess(python(echo), log=tmp_path / "log", variables={"WHO": "me"}, interactive=True) as child:
        child.write_line("hello")
        assert child.read_line(timeout=30) == "HELLO me\n"
        assert child.read_line(timeout=0.2) == "", "killed, since it does not answer"


def test_memory_is_that_of_a_process_and_its_children(tmp_path: Path) -> None:
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_HOLD!r}])"
    with (
        ChildProcess(python(_HOLD), log=tmp_path / "one", interactive=True, sample_memory=True) as one,
        ChildProcess(python(parent), log=tmp_path / "two", interactive=True, sample_memory=True) as two,
    ):
        one.read_line(timeout=60)
        two.read_line(timeout=60)
        assert memory_of(two.pid) > memory_of(one.pid) > 50 * _MIB
    assert two.peak_memory > one.peak_memory > 50 * _MIB
    assert memory_of(one.pid) == 0


# --- logs


def test_the_last_errors_of_a_log_are_the_reason() -> None:
    logged = "error: old\nloading\r99%\x1b[Ka tensor has a wrong shape\nit failed\nthat failed\nerror: no model\nbye"
    reason = "a tensor has a wrong shape; it failed; that failed; error: no model"
    assert failure_reason(logged) == reason
    assert failure_reason(f"{logged}\nTraceback (most recent call last)\n  ValueError: 1") == reason
    assert failure_reason("loading\n\n") == "loading"
    assert failure_reason("") == "it logged nothing"
