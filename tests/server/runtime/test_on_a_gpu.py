"""What only a real GPU can show. Each is skipped, with the reason, where there is none."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.accuracy import psnr
from engines.backends.cuda import open_cuda
from engines.backends.registry import open_device
from engines.manifest import Manifest
from tests.support.gpus import on_a_gpu
from tests.support.machines import Machine

pytestmark = pytest.mark.parametrize(
    "backend", [on_a_gpu(one) for one in ("tensorrt", "tensorrt_rtx", "onnxruntime_cuda")]
)


@pytest.fixture
def real(backend: str, compiled: Callable[[str], Path]) -> Machine:
    return Machine(compiled(backend), backend, lambda: open_device(backend))


def test_every_bucket_draws_what_the_cpu_draws_in_fp32(real: Machine, cpu: Machine) -> None:
    buckets = Manifest.read(real.bundle).rows
    wishes = [{"seed": rows, "num_images": rows // 2, "num_inference_steps": 10} for rows in buckets]
    with cpu.running() as running:
        expected = [running.ask(**body).images() for body in wishes]
    with real.running() as running:
        drawn = [running.ask(**body).images() for body in wishes]  # one after the other, so each fills its bucket
    for rows, pictures, references in zip(buckets, drawn, expected, strict=True):
        for picture, reference in zip(pictures, references, strict=True):
            assert psnr(picture, reference) >= 35, f"{rows} rows"


def test_a_thousand_requests_leave_memory_as_it_was(real: Machine) -> None:
    with real.running() as running:
        for asked in [running.ask(seed=seed, num_inference_steps=2) for seed in range(50)]:
            asked.images()
        cuda, _gpu = open_cuda()
        held, free = running.device.memory(), cuda.free_memory()
        for asked in [running.ask(seed=seed, num_inference_steps=2) for seed in range(1000)]:
            asked.images()
        assert running.device.memory() == held
        assert cuda.free_memory() >= free - 2**24  # the driver may take a little for itself


@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="compute-sanitizer is not installed")
def test_one_request_touches_no_memory_but_its_own(real: Machine) -> None:
    command = ["compute-sanitizer", "--error-exitcode", "9", sys.executable, "-m", "tests.support.one_picture"]
    ended = subprocess.run([*command, str(real.bundle), real.backend], capture_output=True, text=True, check=False)  # noqa: S603 - our own
    assert ended.returncode == 0, ended.stdout[-2000:]
