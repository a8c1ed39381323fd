"""The same request gives the same picture: as diffusers makes it, alone, and in a crowd."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.references import CLASSES, draw, load_pipeline, psnr
from tests.serving import Serving, pictures


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return load_pipeline(checkpoint)


@pytest.mark.parametrize("scheduler", CLASSES)
@pytest.mark.parametrize(("steps", "guidance"), [(20, 7.5), (5, 1.0)])
def test_the_server_draws_what_diffusers_draws(
    serving: Serving, reference: Any, scheduler: str, steps: int, guidance: float
) -> None:
    wish = {
        "prompt": "a red cat on a blue hill",
        "negative_prompt": "rain",
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "width": 48,
        "height": 32,
    }
    ours = pictures(serving.generate(**wish, seed=1234, scheduler=scheduler))[0]
    theirs = draw(reference, scheduler=scheduler, seed=1234, **wish)
    assert ours.shape == theirs.shape == (32, 48, 3)
    assert theirs.std() > 5, "the reference is a flat picture: it proves nothing"
    assert psnr(ours, theirs) >= 45


def test_the_checkpoints_own_defaults_are_diffusers_defaults(serving: Serving, reference: Any) -> None:
    ours = pictures(serving.generate(prompt="two old boats", seed=3))[0]
    theirs = draw(reference, scheduler="pndm", seed=3, prompt="two old boats")
    assert psnr(ours, theirs) >= 45


def crowd() -> list[dict[str, Any]]:
    """Requests of every scheduler, at odd steps, guidances and sizes."""
    schedulers = list(CLASSES)
    return [
        {
            "prompt": f"a {color} bird at night",
            "seed": 100 + index,
            "scheduler": schedulers[index % len(schedulers)],
            "num_inference_steps": 1 + (index * 7) % 23,
            "guidance_scale": 1.0 + (index % 5) * 2.5,
            "num_images": 1 + index % 3,
            "width": 32 if index % 4 else 48,
        }
        for index, color in enumerate(["red", "green", "blue", "old"] * 6)
    ]


def test_openvino_draws_it_too(bundle: Path, reference: Any) -> None:
    with Serving(bundle, "--backend", "openvino") as serving:
        assert serving.client.get("/models").json()[0]["backend"] == "openvino"
        for scheduler in ("dpmpp_2m", "euler_ancestral"):
            ours = pictures(serving.generate(prompt="two old boats", seed=3, scheduler=scheduler))[0]
            assert psnr(ours, draw(reference, scheduler=scheduler, seed=3, prompt="two old boats")) >= 45


def steps_run(serving: Serving) -> float:
    lines = serving.client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("latentd_steps_total"))


def test_a_crowd_changes_nobodys_picture(serving: Serving) -> None:
    wishes = crowd()
    start = steps_run(serving)
    alone = [pictures(serving.generate(**wish)) for wish in wishes]
    middle = steps_run(serving)
    with ThreadPoolExecutor(len(wishes)) as pool:
        together = list(pool.map(lambda wish: pictures(serving.generate(**wish)), wishes))
    assert steps_run(serving) - middle < 0.75 * (middle - start), "they did not share steps: this proves nothing"
    worst = min(psnr(a, b) for one, other in zip(alone, together, strict=True) for a, b in zip(one, other, strict=True))
    assert worst >= 50


def test_each_image_of_a_request_can_be_made_again_alone(serving: Serving) -> None:
    several = serving.generate(prompt="a green bird", seed=2**32 - 1, num_images=3, num_inference_steps=4)
    seeds = [image["seed"] for image in several.json()["images"]]
    assert seeds == [2**32 - 1, 0, 1]
    for seed, picture in zip(seeds, pictures(several), strict=True):
        again = pictures(serving.generate(prompt="a green bird", seed=seed, num_inference_steps=4))[0]
        assert psnr(picture, again) >= 50


def test_the_same_request_gives_the_same_bytes(serving: Serving) -> None:
    wish = {"prompt": "a red cat", "seed": 7, "num_inference_steps": 4}
    headers = {"Accept": "image/png"}
    first, second = (serving.client.post("/generate", json=wish, headers=headers).content for _ in range(2))
    assert first.startswith(b"\x89PNG")
    assert first == second


def test_a_short_request_overtakes_a_long_one(serving: Serving) -> None:
    """It joins at the next step, and leaves when it is done."""
    ended: list[str] = []
    stepping = threading.Event()

    def long() -> None:
        wish = {"prompt": "a red cat", "num_inference_steps": 50, "seed": 1}
        with serving.client.stream("POST", "/generate", json=wish, headers={"Accept": "text/event-stream"}) as answer:
            for line in answer.iter_lines():
                if line == "event: step":
                    stepping.set()
                if line.startswith("data:") and "images" in json.loads(line[5:]):
                    ended.append("long")

    thread = threading.Thread(target=long)
    thread.start()
    assert stepping.wait(30)
    assert serving.generate(prompt="a green bird", num_inference_steps=4, seed=2).status_code == 200
    ended.append("short")
    thread.join(60)
    assert ended == ["short", "long"]
