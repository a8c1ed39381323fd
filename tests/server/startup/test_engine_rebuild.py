"""A bundle whose engines belong to another GPU or release: what the server says, and that it compiles them anew.

The steps are those of docs/operating/upgrades.md. The GPU is a stand-in; the build is real, and stopped at once.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from engines.backends.available import installed
from engines.demo import BUNDLE as DEMO
from engines.manifest import Gpu, Manifest
from tests import ROOT
from tests.support.bare_server import wait_until
from tests.support.ports import free_ports

RTX = "tensorrt_rtx"
A10 = Gpu(name="NVIDIA A10", compute_capability="8.6")
COMPILING = re.compile(r"compiling \w+ for tensorrt_rtx, \d of 5 engines")


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """A bundle with engines of an older release, compiled for an A10 alone."""
    copy = Path(shutil.copytree(DEMO, tmp_path / "moved"))
    manifest = Manifest.load(copy)
    build = manifest.builds["onnxruntime"].model_copy(update={"version": "1.6.0.9", "gpu": A10})
    manifest.model_copy(update={"builds": {RTX: build}}).save(copy)
    return copy


def start(bundle: Path, port: int, *options: str) -> subprocess.Popen[str]:
    arguments = ["--bundle", str(bundle), "--backend", RTX, "--port", str(port), *options]
    return subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-m", "tests.support.another_gpu_server", *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_without_compiling_the_start_ends_with_the_command_that_rebuilds(moved: Path) -> None:
    with start(moved, 0) as server:
        _, log = server.communicate(timeout=120)
    assert server.returncode == 1
    release = ".".join(installed(RTX).split(".")[:3])
    assert log.splitlines()[-1] == (
        f"error: The tensorrt_rtx engines in {moved} were built by TensorRT for RTX 1.6.0 for NVIDIA A10 (compute "
        f"capability 8.6); this machine has TensorRT for RTX {release} and NVIDIA L4 (compute capability 8.9). Rebuild "
        f"them on this machine: .venv/bin/python build_engines.py compile {moved} --backend tensorrt_rtx"
    )


def test_with_compiling_it_is_alive_and_says_how_far_it_is(moved: Path) -> None:
    (port,) = free_ports(1)

    def ready() -> httpx.Response:
        return client.get("/v2/health/ready")

    transport = httpx.HTTPTransport(retries=10)
    with (
        start(moved, port, "--compile") as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport) as client,
    ):
        try:
            wait_until(lambda: bool(COMPILING.search(ready().text)))
            assert ready().status_code == 503
            assert client.get("/v2/health/live").status_code == 200
            assert "latentd_ready 0.0" in client.get("/metrics").text
            refused = client.post("/generate", json={"prompt": "two old boats"})
            assert (refused.status_code, "Retry-After" in refused.headers) == (503, True)
        finally:
            server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=120)
    assert server.returncode == 0, log
    assert "were built by TensorRT for RTX 1.6.0 for NVIDIA A10" in log, "a warning says why"
    assert "the next start goes on" in log
