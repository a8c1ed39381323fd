"""Damaged bundles, no descriptors left, no room on the disk: one line that says so, and nothing is lost."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.faults.callers import Caller, Tally
from engines.demo import BUNDLE as DEMO
from tests import ROOT
from tests.faults.watching import SHORT
from tests.support.bare_server import wait_until
from tests.support.serving import Serving, run_server

_WEIGHTS, _GRAPH = "onnx/denoise.weights", "onnx/denoise.onnx"
_DESCRIPTORS = 100  # that a server may have open
OUTCOMES = ("completed", "failed")


def flip_a_bit(bundle: Path) -> None:
    content = bytearray((bundle / _WEIGHTS).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / _WEIGHTS).write_bytes(content)


def truncate(bundle: Path) -> None:
    os.truncate(bundle / _WEIGHTS, 1000)


def remove(bundle: Path) -> None:
    (bundle / _GRAPH).unlink()


def cut_the_manifest(bundle: Path) -> None:
    os.truncate(bundle / "manifest.json", 200)


def empty_the_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, remove, cut_the_manifest, empty_the_manifest])
def test_damaged_bundles_are_refused_in_one_line(damage: Callable[[Path], None], tmp_path: Path) -> None:
    bundle = shutil.copytree(DEMO, tmp_path / "bundle")
    damage(bundle)
    done = run_server("--bundle", str(bundle), "--port", "0")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert str(bundle) in line or Path(line).name


def test_a_server_without_descriptors_recovers() -> None:
    """Connections beyond its limit wait or are refused; once they are gone, everything is as before."""
    with Serving(DEMO, str(_DESCRIPTORS), module="tests.support.starved_server") as serving:
        tally = Tally()

        async def ask() -> None:
            caller = Caller(serving.url, tally)
            fields = {**SHORT, "num_inference_steps": 3}
            await asyncio.gather(*(caller.ask({**fields, "seed": seed}) for seed in range(3 * _DESCRIPTORS)))

        asyncio.run(ask())
        assert tally.endings["completed"]
        assert tally.endings.keys() <= {"completed", "refused", "unavailable", "disconnected"}
        accepted = [serving.total("latentd_requests_total", api="generate", outcome=one) for one in OUTCOMES]
        assert accepted == [tally.endings["completed"], 0], "only connections without a request may be closed"
        assert tally.endings.total() > tally.endings["completed"], "there were enough: this proves nothing"
        wait_until(lambda: serving.generate(**SHORT).status_code == 200)
        assert serving.process.poll() is None


def test_the_first_request_of_a_server_without_descriptors_is_served() -> None:
    """What requests need is loaded before the first: a late import would need a descriptor, and end the process."""
    with Serving(DEMO) as serving:
        used = len(os.listdir(f"/proc/{serving.process.pid}/fd"))
        resource.prlimit(serving.process.pid, resource.RLIMIT_NOFILE, (used + 1, used + 1))
        answer = serving.generate(**SHORT)
        assert answer.status_code == 200, answer.text + "".join(serving.stderr)
        assert serving.process.poll() is None


def test_a_build_without_room_says_so(checkpoint: Path, tmp_path: Path) -> None:
    """Files of more than 100 kB cannot be written, as on a full disk: one line, and no bundle that is half there."""
    out = tmp_path / "bundle"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    code = f"{limit}; import sys, build_engines; sys.exit(build_engines.main(sys.argv[1:]))"
    words = ["--model", str(checkpoint), "--out", str(out), "--backend", "onnxruntime"]
    command = [sys.executable, "-c", code, *words, "--resolution", "32x32", "--rows", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)  # noqa: S603 - our own
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "written" in done.stderr or "File too large" in done.stderr
    assert not (out / "manifest.json").exists()
