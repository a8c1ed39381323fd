"""The executor's streams under every order that its events allow, and which of its events keep which memory safe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.accuracy import psnr
from engines.backends.cuda import CudaStream
from server.requests.params import Image
from server.requests.tokenizer import Chunk, Prompt
from server.runtime.pipeline.row_cache import RowCache
from tests.engines.backends.fake_cuda import ByPriority, FakeCuda, Seeded
from tests.engines.backends.fake_tensorrt import fake_device
from tests.support.executing import Running
from tests.support.machines import FakeMachine

Patch = pytest.MonkeyPatch

SCHEDULES: dict[str, Callable[[], Any]] = {
    "seed 2": lambda: Seeded(2),
    "by priority": ByPriority,
}


def machine(bundle: Path, cuda: FakeCuda) -> FakeMachine:
    return FakeMachine(bundle, "tensorrt", lambda: fake_device(cuda), cuda)


@pytest.fixture(scope="module", autouse=True)
def newest_rows_are_overwritten() -> Iterator[None]:
    """Evict the rows that were released last, which steps in flight may read. Safety must not depend on the policy."""

    def evict(cache: RowCache[Any]) -> None:
        newest = next(key for key in reversed(cache._rows) if key not in cache._users)
        cache._free.extend(cache._rows.pop(newest))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowCache, "_evict", evict)
        yield


def draw(running: Running) -> list[Image]:
    """What a few requests get that come and go in the steps of each other, and take each other's rows of prompts."""
    del running.pipeline._prompts._cache._free[4:]  # fewer rows than prompts, which overwrite each other's
    asked = [
        running.ask(prompt=f"a red {thing}", seed=seed, num_inference_steps=2 + seed % 3, scheduler="ddim")
        for seed, thing in enumerate(("cat", "boat", "bird", "house", "star", "heart"))
    ]
    return [image for one in asked for image in one.images()]


@pytest.fixture(scope="module")
def executor(fake_bundle: Path) -> Iterator[tuple[Running, FakeCuda]]:
    cuda = FakeCuda(schedule=Seeded(1))
    with machine(fake_bundle, cuda).running() as running:
        yield running, cuda


@pytest.fixture(scope="module")
def expected(executor: tuple[Running, FakeCuda]) -> list[Image]:
    images = draw(executor[0])
    assert not executor[1].faults
    return images


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_images_do_not_depend_on_when_the_gpu_works(fake_bundle: Path, expected: list[Image], schedule: str) -> None:
    cuda = FakeCuda(schedule=SCHEDULES[schedule]())
    with machine(fake_bundle, cuda).running() as running:
        images = draw(running)
    assert not cuda.faults
    for image, other in zip(images, expected, strict=True):
        assert psnr(image, other) >= 50


def newcomers_are_taken_for_encoded(patch: Patch, running: Running) -> None:
    """Steps read rows of prompts which the encoder writes."""
    streams, real = running.pipeline._streams, CudaStream.record
    early = streams.steps.record()
    early.wait()
    patch.setattr(
        CudaStream, "record", lambda stream, **how: early if stream is streams.encode else real(stream, **how)
    )


def decodes_do_not_follow_the_last_step(patch: Patch, running: Running) -> None:
    """They read places of the staging pool which it is about to fill."""
    decode, real = running.pipeline._streams.decode, CudaStream.follow
    patch.setattr(CudaStream, "follow", lambda stream, event: None if stream is decode else real(stream, event))


@pytest.mark.parametrize("mutation", [newcomers_are_taken_for_encoded, decodes_do_not_follow_the_last_step])
def test_an_event_that_is_left_out_is_noticed(
    executor: tuple[Running, FakeCuda], monkeypatch: Patch, mutation: Callable[[Patch, Running], None]
) -> None:
    running, cuda = executor
    draw(running)
    assert not cuda.faults
    with monkeypatch.context() as patch:
        mutation(patch, running)
        draw(running)
    assert any("no event orders them" in fault for fault in cuda.faults)
    cuda.faults.clear()
    draw(running)
    assert not cuda.faults, "with its events again, the executor is sound"


@pytest.mark.parametrize("is_known", [True, False])
def test_a_row_of_a_prompt_is_overwritten_after_the_last_step_that_reads_it(
    executor: tuple[Running, FakeCuda], *, is_known: bool
) -> None:
    running, cuda = executor
    pool, steps = running.pipeline._prompts, running.pipeline._streams.steps
    pool._cache._free.clear()
    first, second = (Prompt("", (Chunk((word,) * 16, (1.0,) * 16),)) for word in (1, 2))
    (row,) = pool.acquire(first)
    running.pipeline._streams.encode.record().wait()
    reading = steps.read(pool.pools["context"], at=row)  # as a step does
    pool.release(first, last_read=steps.record() if is_known else None)
    assert pool.acquire(second) == (row,)
    reading.result()
    pool.release(second)
    running.pipeline._streams.encode.record().wait()
    assert any("no event orders them" in fault for fault in cuda.faults) != is_known
    cuda.faults.clear()
