"""The same request gives the same picture: as diffusers makes it, alone, and in a crowd."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engines.accuracy import psnr
from engines.schedulers import METHODS
from tests.support.meeting import HeldServing
from tests.support.references import CLASSES, Pixels, draw, load_pipeline
from tests.support.serving import Serving, pictures

LONGER = ["", "", " BREAK a red cat", " BREAK a blue hill BREAK in the rain", " and two old boats in the rain" * 8]


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return load_pipeline(checkpoint)


@pytest.mark.parametrize(
    ("scheduler", "steps", "guidance"), [*((name, 20, 7.5) for name in CLASSES), *((name, 5, 1.0) for name in METHODS)]
)
def test_the_server_draws_what_diffusers_draws(
    serving: Serving, reference: Any, scheduler: str, steps: int, guidance: float
) -> None:
    body = {
        "prompt": "a red cat on a blue hill",
        "negative_prompt": "rain",
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "width": 48,
        "height": 32,
    }
    ours = pictures(serving.generate(**body, seed=1234, scheduler=scheduler))[0]
    theirs = draw(reference, scheduler=scheduler, seed=1234, **body)
    assert ours.shape == theirs.shape == (32, 48, 3)
    assert theirs.std() > 5, "the reference is a flat picture: it proves nothing"
    assert psnr(ours, theirs) >= 45


def test_the_checkpoints_own_defaults_are_diffusers_defaults(serving: Serving, reference: Any) -> None:
    ours = pictures(serving.generate(prompt="two old boats", seed=3))[0]
    theirs = draw(reference, scheduler="pndm", seed=3, prompt="two old boats")
    assert psnr(ours, theirs) >= 45


def crowd() -> list[dict[str, Any]]:
    """Requests of every scheduler; steps, guidance, lengths of prompts and sizes are dice."""
    dice, schedulers = random.Random(64), list(CLASSES)
    return [
        {
            "prompt": f"a {dice.choice(['red', 'green', 'blue'])} bird at night" + dice.choice(LONGER),
            "negative_prompt": dice.choice(["", "rain", "two old boats BREAK rain"]),
            "seed": 100 + index,
            "scheduler": schedulers[index % len(schedulers)],
            "num_inference_steps": dice.randint(8, 50),  # steps are brief for the sake of quicker ones
            "guidance_scale": dice.uniform(1, 12),
            "guidance_end": dice.choice([1.0, 1.0, 0.6]),
            "num_images": dice.choice([1, 1, 1, 3]),
            "width": dice.choice([32, 32, 48]),
        }
        for index in range(64)
    ]


def test_openvino_draws_it_too(bundle: Path, reference: Any) -> None:
    with Serving(bundle, "--backend", "openvino") as serving:
        assert serving.client.get("/models").json()[0]["backend"] == "openvino"
        for scheduler in ("dpmpp_2m", "euler_ancestral"):
            ours = pictures(serving.generate(prompt="two old boats", seed=3, scheduler=scheduler))[0]
            assert psnr(ours, draw(reference, scheduler=scheduler, seed=3, prompt="two old boats")) >= 45


def drawn(serving: Serving, body: dict[str, Any]) -> list[Pixels]:
    return pictures(serving.generate(**body))


def steps_run(serving: Serving) -> float:
    lines = serving.client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("latentd_steps_total"))


def test_a_crowd_changes_nobodys_picture(serving: HeldServing) -> None:
    wishes = crowd()
    start = steps_run(serving)
    alone = [drawn(serving, body) for body in wishes]
    middle = steps_run(serving)
    together = serving.together(*(partial(drawn, serving, body) for body in wishes))
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
    body = {"prompt": "a red cat", "seed": 7, "num_inference_steps": 4}
    headers = {"Accept": "image/png"}
    first, second = (serving.client.post("/generate", json=body, headers=headers).content for _ in range(2))
    assert first.startswith(b"\x89PNG")
    assert first == second


def test_a_short_request_overtakes_a_long_one(serving: HeldServing) -> None:
    """It joins at the next step, and leaves when it is done; the long one is left then."""
    long = {"prompt": "a red cat", "num_inference_steps": 200, "num_images": 4, "seed": 1}
    headers = {"Accept": "text/event-stream"}
    with serving.held(), serving.client.stream("POST", "/generate", json=long, headers=headers) as answer:
        serving.let(5)
        lines = answer.iter_lines()  # closes the connection when it is dropped
        assert "event: step" in lines
        serving.let(100)
        assert serving.generate(prompt="a green bird", num_inference_steps=4, seed=2).status_code == 200
        assert serving.metrics()["latentd_requests_running"] == 1


def test_an_exact_picture_is_the_same_bytes_in_a_crowd(serving: HeldServing) -> None:
    body = {"prompt": "a red cat", "seed": 7, "num_inference_steps": 12, "exact": True}
    alone = serving.generate(**body).json()["images"]
    other = {"prompt": "rain", "num_images": 3, "num_inference_steps": 20}
    others = [partial(serving.generate, **other, seed=seed) for seed in range(15)]
    crowded, *answers = serving.together(partial(serving.generate, **body), *others)
    assert {answer.status_code for answer in answers} == {200}
    assert crowded.json()["images"] == alone


def test_exact_draws_one_picture_at_a_time(serving: Serving) -> None:
    refused = serving.generate(prompt="a red cat", exact=True, num_images=2)
    assert refused.status_code == 422
    assert "send one request per seed" in refused.json()["detail"]
