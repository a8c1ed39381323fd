"""How far a build is, by the stages that were announced, and the time that is left."""

from __future__ import annotations

import pytest

from engines.build.outline import Outline


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_stages_count_by_what_they_cost(clock: Clock) -> None:
    outline = Outline(clock)
    outline.begin("downloading")
    outline.end()
    outline.expect(["reading", "exporting decode", "checking"])
    assert outline.fraction(0) == 0
    outline.begin("reading")
    assert outline.fraction(0.5) == pytest.approx(0.5 / 10)
    outline.end()
    outline.begin("exporting decode")
    assert outline.fraction(0.5) == pytest.approx(5 / 10)
    outline.end()
    outline.begin("checking")
    assert outline.fraction(1) == 1


def test_adding_loras_to_a_graph_costs_little(clock: Clock) -> None:
    outline = Outline(clock)
    outline.expect(["exporting denoise", "exporting denoise_lora in fp16"])
    outline.begin("exporting denoise")
    assert outline.fraction(1) == pytest.approx(16 / 17)


def test_stages_that_are_skipped_do_not_count(clock: Clock) -> None:
    outline = Outline(clock)
    outline.expect(["a", "b", "c", "d"])
    outline.begin("c")
    assert outline.position() == ("[1/2]",)
    assert outline.fraction(0) == 0
    outline.end()
    assert outline.fraction(0) == pytest.approx(1 / 2)


def test_stages_that_were_not_expected_count_all_the_same(clock: Clock) -> None:
    outline = Outline(clock)
    assert outline.position() == ()
    outline.expect(["a", "b"])
    outline.begin("other")
    assert outline.position() == ("[1/3]",)
    outline.end()
    assert outline.fraction(0) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("seconds", "fraction", "left"),
    [(10, 0.01, ""), (10, 0.5, "about 10 s left"), (600, 0.25, "about 30 min left"), (10, 1, "")],
)
def test_the_time_that_is_left_is_estimated_once_it_is_no_guess(
    clock: Clock, seconds: float, fraction: float, left: str
) -> None:
    clock.now = 1000
    outline = Outline(clock)
    outline.expect(["a"])
    clock.now += seconds
    assert outline.time_left(fraction) == left
