"""Stable Diffusion XL: a server draws what diffusers' pipelines draw, alone and in a crowd."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import pytest

from engines.accuracy import psnr
from tests.support.parity import CASES, Drawing, Pipelines, crowd
from tests.support.serving import Serving


@pytest.fixture(scope="module")
def xl(xl_bundle: Path) -> Iterator[Serving]:
    with Serving(xl_bundle) as running:
        yield running
        assert running.client.get("/v2/health/ready").status_code == 200


@pytest.fixture(scope="module")
def pipelines(xl_checkpoint: Path) -> Pipelines:
    return Pipelines.load(xl_checkpoint)


def test_every_case_is_drawn_as_by_diffusers(xl: Serving, pipelines: Pipelines) -> None:
    drawings = {name: Drawing.of(name, scheduler="dpmpp_2m", num_inference_steps=4) for name in CASES}
    drawn = {name: drawing.served_by(xl) for name, drawing in drawings.items()}
    found = {name: drawings[name].decibels(ours, pipelines) for name, ours in drawn.items()}
    assert min(found.values()) >= 45, found
    for one, other in combinations(drawn, 2):
        assert psnr(drawn[one][0], drawn[other][0]) < 45, f"{one} and {other} are the same: this proves nothing"


def test_a_crowd_is_drawn_as_by_diffusers(xl: Serving, pipelines: Pipelines) -> None:
    """Of every case at once, in two sizes, some of several images; some share no more than a step."""
    wishes, before = crowd(32), xl.total("latentd_steps_total")
    with ThreadPoolExecutor(len(wishes)) as pool:
        crowded = list(pool.map(lambda one: one.served_by(xl), wishes))
    calls = xl.total("latentd_steps_total") - before
    assert calls < sum(one.fields["num_inference_steps"] for one in wishes), "they shared no step: this proves nothing"
    for wish, ours in zip(wishes, crowded, strict=True):
        assert wish.decibels(ours, pipelines) >= 45, str(wish)
