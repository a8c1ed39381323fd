"""Every case of Stable Diffusion XL with every scheduler, compared with diffusers: a minute or two."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.parity import CASES, Drawing, Pipelines
from tests.support.references import CLASSES
from tests.support.serving import Serving


@pytest.fixture(scope="module")
def pipelines(xl_checkpoint: Path) -> Pipelines:
    return Pipelines.load(xl_checkpoint)


@pytest.mark.parametrize("scheduler", CLASSES)
def test_every_scheduler_draws_what_diffusers_draws(xl_serving: Serving, pipelines: Pipelines, scheduler: str) -> None:
    drawings = {name: Drawing.of(name, scheduler=scheduler) for name in CASES}
    found = {name: drawing.decibels(drawing.served_by(xl_serving), pipelines) for name, drawing in drawings.items()}
    assert min(found.values()) >= 45, found
