"""A server that may write nowhere serves, and says what it could not keep."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests import ROOT
from tests.support.serving import Serving

pytestmark = pytest.mark.faults

DEMO = ROOT / "engines" / "demo"
# In a mount namespace of its own, where the file system that everything here lies on is read-only.
READ_ONLY = ("unshare", "--mount", "sh", "-c", 'mount -o remount,bind,ro / && exec "$@"', "sh")
NOWHERE = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")} | {
    "TMPDIR": "/nonexistent"
}


@pytest.fixture(autouse=True)
def _may_unshare() -> None:
    probe = [*READ_ONLY, "sh", "-c", f"! touch {ROOT}/latentd-probe"]
    may = os.geteuid() == 0 and shutil.which("unshare")
    if not may or subprocess.run(probe, capture_output=True, check=False).returncode:  # noqa: S603 - our own command
        pytest.skip("only a user who may mount file systems can make one read-only")


def serving(*arguments: str) -> Serving:
    return Serving(DEMO, *arguments, start_seconds=300, within=READ_ONLY, environment=NOWHERE)


def large_picture() -> bytes:
    """A PNG of some megabytes, which libraries would spool to a temporary file."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(256, size=(1000, 1000, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def test_without_a_place_to_write_everything_is_served() -> None:
    with serving("--backend", "onnxruntime") as running:
        assert running.generate(prompt="a red heart", seed=1).status_code == 200
        form = {"prompt": "a red heart", "seed": "1", "strength": "0.5"}
        answer = running.client.post("/generate", data=form, files={"image": large_picture()})
        assert answer.status_code == 200, answer.text
        assert running.stop() in (0, -15)


def test_what_was_measured_is_not_remembered_and_the_log_says_so() -> None:
    with serving("--backend", "auto") as running:
        assert running.generate(prompt="a red heart", seed=1).status_code == 200
    (line,) = [line for line in running.stderr if "measured on this machine" in line]
    assert "not remembered (Read-only file system" in line or "two rounds disagree" in line


def test_a_trace_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with serving("--backend", "onnxruntime", "--profile") as running:
        assert running.generate(prompt="a red heart", seed=1).status_code == 200
    assert [line for line in running.stderr if "the trace cannot be written" in line and "Read-only" in line]
    assert not any("Traceback" in line for line in running.stderr)
    assert not list(tmp_path.iterdir())


def test_engines_that_cannot_be_written_are_one_line() -> None:
    """A GPU's engines have to be compiled into the bundle."""
    options = ["--bundle", str(DEMO), "--port", "0", "--compile", "--backend", "tensorrt_rtx"]
    command = [sys.executable, "-m", "server", *options]
    done = subprocess.run(  # noqa: S603 - our own command
        [*READ_ONLY, *command], cwd=ROOT, env=NOWHERE, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "none can be written there (Read-only file system): let the server write to it" in line
