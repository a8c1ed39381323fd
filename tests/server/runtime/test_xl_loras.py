"""LoRAs of Stable Diffusion XL in shared steps: pictures are those of diffusers with the LoRAs fused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from engines.accuracy import psnr
from engines.manifest import Manifest
from tests.support.lora_crowd import XL_KINDS, WrittenLora, fused, write_loras
from tests.support.meeting import HeldServing
from tests.support.parity import Drawing, Pipelines, crowd
from tests.support.references import Pixels
from tests.support.serving import Serving, pictures

Weighted = tuple[WrittenLora, float]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def loras(folder: Path, xl_bundle: Path) -> list[WrittenLora]:
    return write_loras(folder, Manifest.read(xl_bundle), kinds=XL_KINDS)


@pytest.fixture(scope="module")
def served(xl_bundle: Path, folder: Path, loras: list[WrittenLora]) -> Iterator[HeldServing]:
    assert loras
    with HeldServing(xl_bundle, "--loras", str(folder)) as running:
        yield running
        assert running.client.get("/v2/health/ready").status_code == 200


@pytest.fixture(scope="module")
def pipelines(xl_checkpoint: Path) -> Pipelines:
    return Pipelines.load(xl_checkpoint)


def drawn(serving: Serving, drawing: Drawing, chosen: tuple[Weighted, ...]) -> list[Pixels]:
    fields = [{"name": lora.name, "weight": weight} for lora, weight in chosen]
    return pictures(serving.generate(**drawing.body, loras=fields))


def test_the_list_says_which_parts_they_update(served: Serving, loras: list[WrittenLora]) -> None:
    found = {one["name"]: one for one in served.client.get("/loras").json()}
    assert {name for name, one in found.items() if one["usable"]} == {lora.name for lora in loras}
    for lora in loras:
        assert {*found[lora.name]["parts"]} == {target.part for target in lora.changes}


def test_a_crowd_with_loras_is_drawn_as_by_diffusers(
    served: HeldServing, pipelines: Pipelines, loras: list[WrittenLora]
) -> None:
    """Of both encoders and the UNet, in every form of file; some requests have two LoRAs, and some none."""
    choices = [((one, 0.8), (other, -0.5)) for one, other in zip(loras, [*loras[1:], loras[0]], strict=True)]
    wishes = [(drawing, choices[index % len(choices)][: index % 3]) for index, drawing in enumerate(crowd(18, seed=3))]
    crowded = served.together(*(partial(drawn, served, *wish) for wish in wishes))
    for (drawing, chosen), ours in zip(wishes, crowded, strict=True):
        with fused(pipelines.noise, chosen):
            assert drawing.decibels(ours, pipelines) >= 45, f"{drawing} with {[lora.name for lora, _ in chosen]}"


def test_each_lora_changes_the_picture(served: Serving, loras: list[WrittenLora]) -> None:
    """That of the second encoder alone too: prompts that it updates are encoded anew."""
    drawing = Drawing.of("guided", scheduler="euler", num_inference_steps=4)
    (plain,) = drawing.served_by(served)
    for lora in loras:
        assert psnr(plain, drawn(served, drawing, ((lora, 1.0),))[0]) < 45, lora.name
    assert (plain == drawing.served_by(served)[0]).all()
