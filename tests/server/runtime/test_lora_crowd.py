"""Every request its own LoRAs in shared steps: the picture of each is as alone, and as diffusers draws it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engines.accuracy import psnr
from engines.manifest import Manifest
from tests.support.lora_crowd import Wish, WrittenLora, crowd, write_loras
from tests.support.meeting import HeldServing
from tests.support.references import Pixels, load_pipeline
from tests.support.serving import Serving, pictures


@pytest.fixture(scope="module")
def lora_manifest(lora_bundle: Path) -> Manifest:
    return Manifest.read(lora_bundle)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return load_pipeline(checkpoint)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def loras(folder: Path, lora_manifest: Manifest) -> list[WrittenLora]:
    return write_loras(folder, lora_manifest)


@pytest.fixture(scope="module")
def served(lora_bundle: Path, folder: Path, loras: list[WrittenLora]) -> Iterator[HeldServing]:
    assert loras
    with HeldServing(lora_bundle, "--loras", str(folder)) as running:
        yield running
        assert running.client.get("/v2/health/ready").status_code == 200


def drawn(serving: Serving, body: dict[str, Any]) -> Pixels:
    return pictures(serving.generate(**body))[0]


def steps_run(serving: Serving) -> float:
    """The UNet calls so far."""
    return serving.total("latentd_steps_total")


def together(serving: HeldServing, bodies: Sequence[dict[str, Any]]) -> tuple[list[Pixels], float]:
    """The pictures of requests that meet, and the UNet calls that they took."""
    before = steps_run(serving)
    found = serving.together(*(partial(drawn, serving, body) for body in bodies))
    return found, steps_run(serving) - before


def test_a_crowd_with_loras_draws_what_each_would_alone(
    served: HeldServing, reference: Any, loras: list[WrittenLora]
) -> None:
    """Every form of file, two LoRAs at once, the text encoder's part included, mixed with requests without any."""
    wishes = crowd(loras, 12)
    assert {lora.name for wish in wishes for lora, _ in wish.loras} == {lora.name for lora in loras}
    crowded, calls = together(served, [wish.with_loras for wish in wishes])
    alone = [drawn(served, wish.with_loras) for wish in wishes]
    for wish, one, other in zip(wishes, crowded, alone, strict=True):
        assert psnr(one, other) >= 50, str(wish)
        assert psnr(one, wish.drawn_by(reference)) >= 45, str(wish)
    assert calls < sum(wish.body["num_inference_steps"] for wish in wishes), "they shared no step: this proves nothing"


def test_a_lora_changes_the_picture_as_its_weight_says(
    served: Serving, reference: Any, loras: list[WrittenLora]
) -> None:
    body = crowd(loras, 1)[0].body
    plain = drawn(served, body)
    for weight in (1.0, -0.5):
        wish = Wish(body, ((loras[0], weight),))
        ours = drawn(served, wish.with_loras)
        assert psnr(ours, plain) < 35, "the LoRA has no effect: this proves nothing"
        assert psnr(ours, wish.drawn_by(reference)) >= 45
    assert (drawn(served, {**body, "loras": [{"name": loras[0].name, "weight": 0.0}]}) == plain).all()


def test_requests_without_loras_are_the_same_bytes_as_on_a_server_without_any(
    served: Serving, serving: Serving, loras: list[WrittenLora]
) -> None:
    """Also after LoRAs were used: a step without any takes the plain graph."""
    wish = crowd(loras, 1)[0]
    assert served.generate(**wish.with_loras).status_code == 200
    ours, theirs = (one.generate(**wish.body).json()["images"] for one in (served, serving))
    assert ours == theirs
