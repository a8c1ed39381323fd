"""The capacity that follows from a curve of step times."""

from __future__ import annotations

import pytest

from engines.demo import BUNDLE
from engines.manifest import Manifest
from loadtest.analysis.capacity import Capacity, Work, read_curve
from server.runtime.batching.step_times import StepTimeModel, StepWork
from server.runtime.monitoring.metrics import Metrics

WORK = Work(rows=2, steps=25, encode_decode=0.05)


def test_the_example_of_the_document() -> None:
    """docs/operating/sizing.md."""
    capacity = Capacity.of({2: 0.03, 16: 0.1}, WORK)
    assert (capacity.rows, capacity.step) == (16, 0.1)
    assert round(capacity.images_per_second, 2) == 2.76
    assert round(capacity.images_per_second_of_steps, 2) == 3.2
    assert capacity.servers(20, utilization=0.7) == 11


def test_an_unguided_image_costs_half_the_steps() -> None:
    unguided = Work(rows=1, steps=25, encode_decode=0)
    guided = unguided.model_copy(update={"rows": 2})
    half, whole = (Capacity.of({16: 0.1}, work).images_per_second for work in (guided, unguided))
    assert whole == pytest.approx(2 * half)


def test_a_model_without_a_curve_has_no_capacity() -> None:
    with pytest.raises(ValueError, match="has no series of full steps"):
        Capacity.of({}, WORK)


class _Model:
    """What metrics read of a model."""

    name, state, memory = "demo", "ready", 0

    def __init__(self, step_times: StepTimeModel) -> None:
        self.step_times = step_times


def test_the_curve_is_that_of_the_model_the_size_and_full_steps() -> None:
    """As the server exposes it."""
    size = Manifest.load(BUNDLE).resolutions[0]
    times = StepTimeModel(max_rows=16)
    measured: list[tuple[StepWork, int, float]] = [("full", 2, 0.02), ("full", 16, 0.1), ("shallow", 2, 0.001)]
    for depth, rows, seconds in measured:
        times.observe((size, depth), rows, seconds)
    metrics = Metrics(max_rows=16, models=["demo"])
    metrics.watch({}, [_Model(times)])
    text = metrics.render().decode()
    assert read_curve(text, model="demo", size=str(size)) == pytest.approx({2: 0.02, 16: 0.1})
    assert read_curve(text, model="other", size=str(size)) == {}
    assert read_curve(text, model="demo", size="8x8") == {}
