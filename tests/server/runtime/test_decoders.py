"""Requests choose what decodes their images: those that finish together are decoded apart, and no image changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engines.accuracy import psnr
from engines.backends.onnxruntime import OnnxRuntimeDevice
from engines.errors import EngineError
from server.requests.params import Image
from tests.engines.backends.fake_cuda import FakeCuda
from tests.engines.backends.fake_tensorrt import fake_device, write_bundle
from tests.support.executing import Asked, Running
from tests.support.machines import FakeMachine, Machine

SAME: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 1, "scheduler": "ddim"}
CROWD: list[dict[str, Any]] = [
    {**SAME, "seed": 1},
    {**SAME, "seed": 2, "decoder": "fast"},
    {**SAME, "seed": 3, "decoder": "fast", "num_images": 2},
    {**SAME, "seed": 4},
]


@pytest.fixture
def cpu(fast_bundle: Path) -> Machine:
    return Machine(fast_bundle, "onnxruntime", lambda: OnnxRuntimeDevice(threads=1))


@pytest.fixture
def gpu(fast_bundle: Path, tmp_path: Path) -> FakeMachine:
    write_bundle(fast_bundle, tmp_path / "bundle", rows=(2, 8))
    cuda = FakeCuda()
    return FakeMachine(tmp_path / "bundle", "tensorrt", lambda: fake_device(cuda), cuda)


def ask_together(running: Running, wishes: Sequence[dict[str, Any]]) -> list[Asked]:
    """All of them before the first step, which on a CPU they take together."""
    with running.batcher._changed:
        return [running.ask(**fields) for fields in wishes]


def check_alike(crowd: Sequence[Sequence[Image]], alone: Sequence[Sequence[Image]]) -> None:
    for some, others in zip(crowd, alone, strict=True):
        assert all(psnr(one, other) >= 50 for one, other in zip(some, others, strict=True))


def test_those_who_finish_in_one_step_are_decoded_by_decoder_the_fast_first(cpu: Machine) -> None:
    with cpu.running(decode_chunk=2) as running:
        running.device.armed = True
        crowd = ask_together(running, CROWD)
        together = [asked.images() for asked in crowd]
        launches = dict(running.device.launches)
        order = [crowd.index(asked) for asked in running.ended]
        alone = [running.ask(**fields).images() for fields in CROWD]
        other = running.ask(**{**CROWD[0], "decoder": "fast"}).images()
    assert (launches["denoise"], launches["decode"], launches["decode_fast"]) == (3, 1, 2)
    assert order == [1, 2, 0, 3]
    check_alike(together, alone)
    assert psnr(other[0], alone[0][0]) < 30, "both decoders make the same images: this proves nothing"


def test_one_decoder_that_fails_ends_only_the_requests_that_chose_it(cpu: Machine) -> None:
    def fail() -> None:
        raise EngineError("the distilled decoder fails")

    with cpu.running(decode_chunk=2) as running:
        running.device.before("decode_fast", 1, fail)
        running.device.before("decode_fast", 2, fail)
        running.device.armed = True
        names = [asked.outcome_name() for asked in ask_together(running, CROWD)]
        assert [name == "Completed" for name in names] == [True, False, False, True]
        assert running.ask(**CROWD[1]).outcome_name() == "Completed"


def test_on_a_gpu_all_of_it_is_bound_and_recorded_before_ready(gpu: FakeMachine) -> None:
    with gpu.running() as running:
        running.device.armed = True
        bound, memory = len(running.device.bound), running.device.memory()
        recorded = gpu.cuda.calls["cudaGraphLaunch"]
        together = [asked.images() for asked in ask_together(running, CROWD)]
        alone = [running.ask(**fields).images() for fields in CROWD]
        assert (len(running.device.bound), running.device.memory()) == (bound, memory)
        launched = sum(running.device.launches.values())
        assert gpu.cuda.calls["cudaGraphLaunch"] - recorded == launched, "something ran that had not been recorded"
    assert not gpu.cuda.faults
    check_alike(together, alone)


def test_the_times_of_both_decoders_are_measured_before_ready(cpu: Machine) -> None:
    with cpu.running() as running:
        (size,) = running.manifest.resolutions
        assert 0 < running.step_times.encode_decode(size, "fast") != running.step_times.encode_decode(size)
