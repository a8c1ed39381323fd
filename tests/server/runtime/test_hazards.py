"""The executor's streams under every order that its events allow, and which of its events keep which memory safe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.accuracy import psnr
from engines.backends.cuda import CudaStream
from server.requests.request import Image
from server.runtime.pipeline import Pipeline
from server.runtime.prompt_pool import PromptPool
from tests.engines.backends.fake_cuda import ByPriority, FakeCuda, Seeded
from tests.engines.backends.fake_tensorrt import fake_device
from tests.support.executing import Running
from tests.support.machines import FakeMachine

Patch = pytest.MonkeyPatch

SCHEDULES: dict[str, Callable[[], Any]] = {
    "seed 1": lambda: Seeded(1),
    "seed 2": lambda: Seeded(2),
    "by priority": ByPriority,
}


def machine(bundle: Path, cuda: FakeCuda) -> FakeMachine:
    return FakeMachine(bundle, "tensorrt", lambda: fake_device(cuda), cuda)


@pytest.fixture(scope="module", autouse=True)
def newest_rows_are_overwritten() -> Iterator[None]:
    """Evict the rows that were released last, which steps in flight may read. Safety must not depend on the policy."""

    def evict(pool: PromptPool) -> int:
        return pool._rows.pop(next(key for key in reversed(pool._rows) if key not in pool._users))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptPool, "_evict", evict)
        yield


def draw(running: Running) -> list[Image]:
    """What a few requests get that come and go in the steps of each other, and take each other's rows of prompts."""
    del running.pipeline._prompts._free[4:]  # fewer rows than prompts, which overwrite each other's
    asked = [
        running.ask(prompt=f"a red {thing}", seed=seed, num_inference_steps=2 + seed % 3, scheduler="ddim")
        for seed, thing in enumerate(("cat", "boat", "bird", "house", "star", "heart"))
    ]
    return [image for one in asked for image in one.images()]


@pytest.fixture(scope="module")
def expected(fake_bundle: Path) -> list[Image]:
    cuda = FakeCuda()
    with machine(fake_bundle, cuda).running() as running:
        images = draw(running)
    assert not cuda.faults
    return images


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_images_do_not_depend_on_when_the_gpu_works(fake_bundle: Path, expected: list[Image], schedule: str) -> None:
    cuda = FakeCuda(schedule=SCHEDULES[schedule]())
    with machine(fake_bundle, cuda).running() as running:
        images = draw(running)
    assert not cuda.faults
    for image, other in zip(images, expected, strict=True):
        assert psnr(image, other) >= 50


@pytest.fixture(scope="module")
def executor(fake_bundle: Path) -> Iterator[tuple[Running, FakeCuda]]:
    cuda = FakeCuda(schedule=Seeded(3))
    with machine(fake_bundle, cuda).running() as running:
        draw(running)
        yield running, cuda


def newcomers_are_taken_for_encoded(patch: Patch, running: Running) -> None:
    """Steps read rows of prompts which the encoder writes."""
    streams, real = running.pipeline._streams, CudaStream.record
    early = streams.steps.record()
    early.wait()
    patch.setattr(
        CudaStream, "record", lambda stream, **how: early if stream is streams.encode else real(stream, **how)
    )


def rows_of_prompts_are_not_kept_for_the_last_step(patch: Patch, _running: Running) -> None:
    """The encoder overwrites rows which steps in flight read."""
    real = Pipeline.step

    def step(pipeline: Pipeline, plan: Any) -> Any:
        launched = real(pipeline, plan)
        pipeline._last_step = None
        return launched

    patch.setattr(Pipeline, "step", step)


def the_encoder_follows_nothing(patch: Patch, _running: Running) -> None:
    patch.setattr(CudaStream, "follow", lambda _stream, _event: None)


@pytest.mark.parametrize(
    "mutation",
    [newcomers_are_taken_for_encoded, rows_of_prompts_are_not_kept_for_the_last_step, the_encoder_follows_nothing],
)
def test_an_event_that_is_left_out_is_noticed(
    executor: tuple[Running, FakeCuda], monkeypatch: Patch, mutation: Callable[[Patch, Running], None]
) -> None:
    running, cuda = executor
    assert not cuda.faults
    with monkeypatch.context() as patch:
        mutation(patch, running)
        draw(running)
    assert any("no event orders them" in fault for fault in cuda.faults)
    cuda.faults.clear()
    draw(running)
    assert not cuda.faults, "with its events again, the executor is sound"
