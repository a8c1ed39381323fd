"""Locust itself, in processes of its own, because it patches the standard library where it is imported."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.demo import BUNDLE as DEMO
from tests import ROOT
from tests.support.bare_server import wait_until
from tests.support.serving import Serving

PROMPT = "a red heart on a yellow background"
_SOME = 8  # requests

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("locust") is None, reason="needs Locust: pip install -e '.[locust]'"
)


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    path = tmp_path / "mix.jsonl"
    entry = {"prompt": PROMPT, "num_inference_steps": 2}
    path.write_text("\n".join(json.dumps({**entry, "scheduler": name}) for name in ("euler", "dpmpp_2m")))
    return path


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--headless", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603 - our own


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit code and the output."""
    try:
        said, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, said


def counted(run: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Return requests and failures by type and name, from the JSON file that Locust writes at its end."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for line in json.loads(run.with_suffix(".json").read_text()):
        found.setdefault(line["method"], {})[line["name"]] = (line["num_requests"], line["num_failures"])
    return found


def totals(said: str) -> tuple[int, int]:
    """Return requests and failures of the last table."""
    requests, failures = re.findall(r"Aggregated +(\d+) +(\d+)\(", said)[-1]
    return int(requests), int(failures)


def completed(serving: Serving) -> float:
    """Return the number of completed requests, by the server's count."""
    return serving.total("latentd_requests_total", outcome="completed")


def stop_once(process: subprocess.Popen[str], condition: Callable[[], bool]) -> tuple[int, str]:
    """End the run once `condition` holds; return the exit code and the output."""
    wait_until(condition, seconds=300)
    process.send_signal(signal.SIGTERM)
    return end(process)


def run_words(url: str, seconds: int = 120) -> list[str]:
    return ["--host", url, "--users", "2", "--spawn-rate", "2", "--run-time", f"{seconds}s", "--stop-timeout", "60"]


@pytest.mark.parametrize("response_format", ["json", "events", "openai"])
def test_every_entry_is_counted_by_its_name(demo: Serving, response_format: str, mix: Path, tmp_path: Path) -> None:
    before = completed(demo)
    words = [*run_words(demo.url), "--mix", str(mix), "--format", response_format, "--stages"]
    run = start(*words, "--csv", str(tmp_path / "run"), "--json-file", str(tmp_path / "run"))
    statistics = tmp_path / "run_stats.csv"  # which Locust writes now and then, and not at its end
    code, said = stop_once(
        run, lambda: completed(demo) >= before + _SOME and "stage,denoise," in statistics.read_text()
    )
    assert code == 0, said
    done = completed(demo) - before
    found = counted(tmp_path / "run")
    assert found.keys() == {"POST", "stage"}
    assert found["POST"].keys() <= {"line 1", "line 2"}
    assert sum(count for count, _ in found["POST"].values()) == done >= _SOME
    assert not any(failures for _, failures in found["POST"].values())
    assert found["stage"] == dict.fromkeys(("queue", "encode", "denoise", "decode", "image"), (done, 0))


def test_workers_receive_the_mix_from_the_master(demo: Serving, mix: Path, tmp_path: Path) -> None:
    before = completed(demo)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
    words = [*run_words(demo.url), "--mix", str(mix), "--json-file", str(tmp_path / "run")]
    bound = ["--master-bind-host", "127.0.0.1", "--master-bind-port", port]
    master = start(*words, "--master", "--expect-workers", "1", *bound)
    worker = start("--worker", "--master-host", "127.0.0.1", "--master-port", port)
    code, said = stop_once(master, lambda: completed(demo) >= before + _SOME)
    worker_code, worker_said = end(worker)
    assert code == 0, said
    assert worker_code == 0, worker_said
    asked = counted(tmp_path / "run")["POST"]
    assert asked.keys() <= {"line 1", "line 2"}
    assert (
        0 < sum(count for count, _ in asked.values()) <= completed(demo) - before
    )  # it ends without requests still in flight
    assert not any(failures for _, failures in asked.values())


def test_refusals_are_counted_and_followed_by_a_pause(mix: Path) -> None:
    """With many users and a queue of one, most are refused, and return after Retry-After."""
    users = 24
    with Serving(DEMO, "--max-waiting", "1") as serving:
        words = [
            *run_words(serving.url, seconds=3),
            "--users",
            str(users),
            "--spawn-rate",
            str(users),
            "--mix",
            str(mix),
        ]
        code, said = end(start(*words))
        refused = serving.metrics()['latentd_requests_rejected_total{reason="QueueFull"}']
    assert code == 1
    assert "refused (429)" in said
    assert totals(said)[1] == refused > 0
    assert refused <= users * 8  # a second's pause after each, in a run of three on a machine that may be busy


def test_failing_server_is_counted_as_failures(tmp_path: Path) -> None:
    """Some images arrive before its device is lost; then its process ends."""
    failed = tmp_path / "run_failures.csv"  # which Locust writes now and then
    with Serving(DEMO, "is-lost", module="tests.support.broken_server") as serving:
        words = [*run_words(serving.url), "--steps", "8", "--csv", str(tmp_path / "run")]
        process = start(*words)
        assert serving.process.wait(300) == 70
        code, said = stop_once(process, lambda: failed.exists() and "ConnectionError" in failed.read_text())
    assert code == 1, said
    requests, failures = totals(said)
    assert 0 < failures < requests
    assert "prompt 'a red heart on a yellow background'" in said  # of the model's examples
    assert "not ready (503)" in said
    assert "failed: ConnectionError" in said  # the process is gone then


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mix", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--mix", "x", "--steps", "3"], "--mix gives all fields of a request itself"),
        ([], "Name the server with --host"),
        (["--host", "http://127.0.0.1:9"], "refused"),
        (["--format", "smiling"], "invalid choice"),
    ],
)
def test_invalid_options_end_it_at_once(words: list[str], message: str) -> None:
    code, said = end(start(*words))
    assert code == 2, said
    assert message in said
