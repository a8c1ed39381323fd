"""LoRAs under load: a crowd of 32, more LoRAs than the device holds, files that come and change, callers who leave."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.callers import Caller, Tally
from engines.accuracy import psnr
from engines.manifest import Manifest
from engines.schedulers import METHODS
from tests.support.lora_crowd import Wish, WrittenLora, crowd, write_loras
from tests.support.references import Pixels, load_pipeline
from tests.support.serving import Serving, pictures

CROWD = 32


@pytest.fixture(scope="module")
def lora_manifest(lora_bundle: Path) -> Manifest:
    return Manifest.read(lora_bundle)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return load_pipeline(checkpoint)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "loras"


@pytest.fixture
def loras(folder: Path, lora_manifest: Manifest) -> list[WrittenLora]:
    return write_loras(folder, lora_manifest)


@pytest.fixture
def served(lora_bundle: Path, folder: Path, loras: list[WrittenLora]) -> Iterator[Serving]:
    assert loras
    with Serving(lora_bundle, "--loras", str(folder)) as running:
        yield running
        assert running.client.get("/v2/health/ready").status_code == 200


def steps_run(serving: Serving) -> float:
    """The UNet calls so far."""
    return serving.total("latentd_steps_total")


def together(serving: Serving, bodies: list[dict[str, Any]]) -> tuple[list[Pixels], float]:
    """The pictures of requests that are sent at once, and the UNet calls that they took."""
    before = steps_run(serving)
    with ThreadPoolExecutor(len(bodies)) as pool:
        found = list(pool.map(lambda body: pictures(serving.generate(**body))[0], bodies))
    return found, steps_run(serving) - before


def test_32_requests_with_8_loras_share_their_steps(served: Serving, reference: Any, loras: list[WrittenLora]) -> None:
    """Each equals itself alone and diffusers, and they take as many UNet calls as without LoRAs."""
    wishes = crowd(loras, CROWD)
    assert sum(not wish.loras for wish in wishes) == CROWD // 4
    assert sum(len(wish.loras) == 2 for wish in wishes) > 0
    without = min(together(served, [wish.body for wish in wishes])[1] for _ in range(3))
    rounds = [together(served, [wish.with_loras for wish in wishes]) for _ in range(3)]
    for found, _ in rounds:
        for wish, crowded in zip(wishes, found, strict=True):
            assert psnr(crowded, pictures(served.generate(**wish.with_loras))[0]) >= 50, str(wish)
            assert psnr(crowded, wish.drawn_by(reference)) >= 45, str(wish)
    # When 32 threads get to send is not the same twice, and a request that comes a step later may take another call.
    assert min(calls for _, calls in rounds) <= 1.05 * without


def test_every_scheduler_draws_with_a_lora_as_diffusers_does(
    served: Serving, reference: Any, loras: list[WrittenLora]
) -> None:
    body = crowd(loras, 1)[0].body
    wishes = [Wish({**body, "scheduler": name}, ((lora, 0.8),)) for name, lora in zip(METHODS, loras * 9, strict=False)]
    assert len(wishes) == len(METHODS)
    found, _ = together(served, [wish.with_loras for wish in wishes])
    for wish, crowded in zip(wishes, found, strict=True):
        assert psnr(crowded, wish.drawn_by(reference)) >= 45, wish.body["scheduler"]


def test_more_loras_than_the_device_holds_take_turns(
    lora_bundle: Path, lora_manifest: Manifest, folder: Path, reference: Any
) -> None:
    """The pool holds 32 ranks, and these have 64: requests wait for room, and nothing else changes."""
    loras = write_loras(folder, lora_manifest, ranks=(8,) * 8)
    wishes = [wish for wish in crowd(loras, CROWD) if wish.loras]
    with Serving(lora_bundle, "--loras", str(folder)) as served:
        found, _ = together(served, [wish.with_loras for wish in wishes])
        for wish, crowded in zip(wishes, found, strict=True):
            assert psnr(crowded, wish.drawn_by(reference)) >= 45, str(wish)


def test_a_lora_that_is_added_under_load_can_be_chosen(
    served: Serving, folder: Path, reference: Any, loras: list[WrittenLora], lora_manifest: Manifest, tmp_path: Path
) -> None:
    more = write_loras(tmp_path / "more", lora_manifest, ranks=(3,) * 8)[0]
    wishes = crowd(loras, 16)
    with ThreadPoolExecutor(16) as pool:
        running = [pool.submit(served.generate, **wish.with_loras) for wish in wishes]
        shutil.copy(tmp_path / "more" / f"{more.name}.safetensors", folder / "added.safetensors")
        wish = Wish(wishes[0].body, ((WrittenLora("added", more.changes), 1.0),))
        added = pictures(served.generate(**wish.with_loras))[0]
        assert psnr(added, wish.drawn_by(reference)) >= 45
        assert all(one.result().status_code == 200 for one in running)


def test_a_file_that_is_replaced_under_load_is_the_old_or_the_new_one(
    served: Serving, folder: Path, reference: Any, loras: list[WrittenLora], lora_manifest: Manifest, tmp_path: Path
) -> None:
    """Never a mixture: each picture is that of one of both files, and those after the change of the new one."""
    name, body = loras[0].name, crowd(loras, 1)[0].body
    other = write_loras(tmp_path / "other", lora_manifest, ranks=(4,) * 8, seed=50)[1]
    before, after = Wish(body, ((loras[0], 1.0),)), Wish(body, ((WrittenLora(name, other.changes), 1.0),))
    expected = [wish.drawn_by(reference) for wish in (before, after)]
    assert psnr(*expected) < 35
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(served.generate, **before.with_loras) for _ in range(24)]
        written = folder / "new.part"
        shutil.copy(tmp_path / "other" / f"{other.name}.safetensors", written)
        written.replace(folder / f"{name}.safetensors")
        for one in running:
            assert max(psnr(pictures(one.result())[0], whole) for whole in expected) >= 45
    assert psnr(pictures(served.generate(**after.with_loras))[0], expected[1]) >= 45


def test_callers_who_leave_lose_no_room_of_the_pool(served: Serving, loras: list[WrittenLora]) -> None:
    """Every request has one ending, and afterwards all LoRAs fit again."""
    wishes = crowd(loras, CROWD)
    tally = Tally()

    async def leave_and_stay() -> None:
        caller = Caller(served.url, tally)
        async with asyncio.TaskGroup() as group:
            for times in range(4):
                for number, wish in enumerate(wishes):
                    leaves = 0.02 * (1 + number % 9) if (number + times) % 2 else None
                    group.create_task(caller.ask(wish.with_loras, leave_after=leaves))

    asyncio.run(leave_and_stay())
    assert tally.endings.keys() <= {"completed", "left", "refused"}
    assert tally.endings["completed"] > 0
    assert tally.endings["left"] > 0
    assert sum(tally.endings.values()) == tally.sent
    found, _ = together(served, [wish.with_loras for wish in wishes])
    assert len(found) == CROWD
