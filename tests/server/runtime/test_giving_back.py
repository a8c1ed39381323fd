"""What an executor held on the device is given back, however it ended, and whoever drops the last of it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

from engines.backends.tensorrt.device import TensorRtDevice
from engines.errors import EngineError
from server.runtime.pipeline.latent_pool import LatentPool
from server.runtime.pipeline.pipeline import Pipeline
from server.runtime.steps import Steps
from tests.engines.backends.fake_cuda import FakeCuda
from tests.support.executing import Asked, Running
from tests.support.machines import FakeMachine

Patch = pytest.MonkeyPatch


def held(cuda: FakeCuda) -> dict[str, int]:
    """How much of each kind there still is."""
    counts = {
        "device memory": len(cuda.live()),
        "pinned memory": len(cuda.live(pinned=True)),
        "graphs": cuda.graphs,
        "streams": len(cuda._streams),
        "events": len(cuda._events),
    }
    return {kind: count for kind, count in counts.items() if count}


class Unheld(Running):
    """An executor of which only its thread holds the device and the pipeline."""

    def __enter__(self) -> Unheld:
        super().__enter__()
        vars(self).pop("device", None)
        vars(self).pop("pipeline", None)
        return self

    def _ready(self) -> None:
        self._started.set()


def unheld(gpu: FakeMachine) -> Unheld:
    return Unheld(gpu.bundle, gpu.device, backend=gpu.backend)


def draw(running: Running, **fields: Any) -> str:
    return running.ask(num_inference_steps=5, cache="fast", num_images=2, **fields).outcome_name()


def test_everything_is_given_back_when_the_executor_has_ended(gpu: FakeMachine) -> None:
    with unheld(gpu) as running:
        assert draw(running) == "Completed"
        assert {"device memory", "pinned memory", "graphs", "streams", "events"} == set(held(gpu.cuda))
    assert not running.executor.alive
    assert held(gpu.cuda) == {}


def test_what_others_hold_is_given_back_when_they_drop_it(gpu: FakeMachine) -> None:
    """As benchmarks and tests do, which look at the pipeline of an executor that has ended."""
    with gpu.running() as running:
        assert draw(running) == "Completed"
    assert held(gpu.cuda)["graphs"]
    del running
    gc.collect()
    assert held(gpu.cuda) == {}


def fail_in_the_second_engine(patch: Patch, _cuda: FakeCuda) -> None:
    real, loaded = TensorRtDevice.load, list[object]()

    def load(device: TensorRtDevice, *args: Any, **options: Any) -> Any:
        loaded.append(1)
        if len(loaded) > 1:
            raise EngineError("a damaged engine")
        return real(device, *args, **options)

    patch.setattr(TensorRtDevice, "load", load)


def fail_in_the_warm_up(patch: Patch, cuda: FakeCuda) -> None:
    real, steps = LatentPool.bind, list[object]()

    def full(pool: LatentPool, plan: Any) -> Any:
        steps.append(1)
        if len(steps) == 9:
            cuda.fail("cudaMalloc", "cudaErrorMemoryAllocation")
            pool._device.allocate((1,), "uint8", purpose="scratch")
        return real(pool, plan)

    patch.setattr(LatentPool, "bind", full)


def fail_the_test_image(patch: Patch, _cuda: FakeCuda) -> None:
    def decode(_pool: LatentPool, _staged: object) -> Any:
        raise EngineError("the decoder fails")

    patch.setattr(LatentPool, "decode", decode)


def fail_unexpectedly(patch: Patch, _cuda: FakeCuda) -> None:
    def plan(_pipeline: Pipeline, _placements: object) -> Any:
        raise RuntimeError("a bug")

    patch.setattr(Pipeline, "plan", plan)


@pytest.mark.parametrize(
    "fail", [fail_in_the_second_engine, fail_in_the_warm_up, fail_the_test_image, fail_unexpectedly]
)
def test_a_failed_start_gives_everything_back_and_another_one_may_follow(
    gpu: FakeMachine, monkeypatch: Patch, fail: Callable[[Patch, FakeCuda], None]
) -> None:
    with monkeypatch.context() as patch:
        fail(patch, gpu.cuda)
        with unheld(gpu) as running:
            assert running.failures
    gc.collect()
    assert held(gpu.cuda) == {}
    with unheld(gpu) as again:
        assert draw(again) == "Completed"
    gc.collect()
    assert held(gpu.cuda) == {}


def test_a_failed_step_of_which_the_error_is_kept_holds_nothing(gpu: FakeMachine, monkeypatch: Patch) -> None:
    def step(_pool: LatentPool, _plan: object) -> None:
        raise EngineError("the step fails")

    with unheld(gpu) as running:
        with monkeypatch.context() as patch:
            patch.setattr(LatentPool, "step", step)
            asked = running.ask(num_inference_steps=3)
            assert asked.outcome_name() == "StepFailed"
        assert draw(running) == "Completed"
    gc.collect()
    assert held(gpu.cuda) == {}
    assert asked.endings


def test_a_fault_with_steps_in_flight_gives_everything_back(gpu: FakeMachine, monkeypatch: Patch) -> None:
    def complete(_steps: Steps, _step: object) -> None:
        raise RuntimeError("a bug")

    with unheld(gpu) as running:
        monkeypatch.setattr(Steps, "_complete", complete)
        assert draw(running) == "NotReady"
    gc.collect()
    assert held(gpu.cuda) == {}


def test_a_lost_device_keeps_nobody_waiting_and_everything_is_tried(gpu: FakeMachine) -> None:
    """CUDA frees nothing then; but streams, which are threads of the fake, end."""
    with unheld(gpu) as running:
        crowd = [running.ask(num_inference_steps=60, seed=seed) for seed in range(3)]
        crowd[0].wait(lambda: crowd[0].steps)
        gpu.cuda.lose("cudaErrorIllegalAddress")
        assert [asked.outcome_name() for asked in crowd] == ["NotReady"] * 3
    gc.collect()
    calls = gpu.cuda.calls
    assert (calls["cudaFree"], calls["cudaFreeHost"]) == (calls["cudaMalloc"], calls["cudaHostAlloc"])
    assert not gpu.cuda._streams


def test_a_request_that_outlives_the_executor_holds_nothing(gpu: FakeMachine) -> None:
    with unheld(gpu) as running:
        asked = Asked()
        request = running.request(asked, num_inference_steps=2, preview_every=1)
        running.batcher.submit(request)
        assert asked.outcome_name() == "Completed"
    gc.collect()
    assert held(gpu.cuda) == {}
    assert request.outcome
