"""Plans that are filled up to a shape of which engines were recorded."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest

from engines.manifest import NoiseSchedule, Size
from engines.schedulers import Scheduler, table
from server.requests.params import GenerationParams
from server.requests.request import Request
from server.requests.tokenizer import Prompt
from server.runtime.pipeline.admission import FeaturePlaces, Placement
from server.runtime.pipeline.noise import NoiseGenerator, StepNoise
from server.runtime.pipeline.plan import StepShape, make_plan, step_shape

LATENT = (4, 8, 8)
SPARE = 8
NOTHING = Prompt("", ())


def placement(
    *,
    slots: tuple[int, ...],
    guided: bool = True,
    scheduler: str = "ddim",
    chunks: int = 1,
    features: tuple[tuple[int, ...], ...] = (),
    step: int = 0,
) -> Placement:
    scale = 7.5 if guided else 1.0
    size, method = Size(width=64, height=64), Scheduler(scheduler)
    full_steps = 1 if features else None
    params = GenerationParams(NOTHING, NOTHING, size, method, 6, scale, tuple(range(len(slots))), full_steps=full_steps)
    request = Request(params, table(method, 6, NoiseSchedule()), (), "a")
    advance(request, step)
    prompts = (tuple(range(1, 1 + chunks)), (9,))
    noise = StepNoise([NoiseGenerator(seed) for seed in params.seeds], LATENT)
    places = FeaturePlaces(features, lambda _freed: None)
    return Placement(request, ExitStack(), slots=slots, prompts=prompts, noise=noise, features=places)


def advance(request: Request, steps: int = 1) -> None:
    for _ in range(steps):
        request.advance()


def test_what_fills_a_step_up_is_an_image_of_the_spare_slot_that_changes_nothing() -> None:
    placements = [placement(slots=(3, 5)), placement(slots=(1,), guided=False)]
    assert step_shape(placements) == StepShape(3, 5, 1)
    plan = make_plan(placements, LATENT, shape=StepShape(8, 8, 1), spare=SPARE)
    assert plan.rows == 5
    exact = make_plan(placements, LATENT, shape=StepShape(3, 5, 1), spare=SPARE)
    for name, array in exact.arrays.items():
        part = tuple(slice(length) for length in array.shape)
        np.testing.assert_array_equal(plan.arrays[name][part], array, err_msg=name)
    assert plan.arrays["slot"].tolist() == [3, 5, 1, *[SPARE] * 5]
    assert (plan.arrays["row_image"][5:] >= 3).all(), "a row that fills up would be an image's"
    assert not plan.arrays["guidance"][3:].any()
    assert not plan.arrays["guidance"][:, 5:].any()
    assert not plan.arrays["coef"][3:].any()


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_prompts_are_repeated_whole_up_to_the_length_of_the_shape(chunks: int) -> None:
    plan = make_plan([placement(slots=(0,), chunks=chunks)], LATENT, shape=StepShape(2, 2, 6), spare=SPARE)
    output, negative = plan.arrays["row_context"].tolist()
    assert output == list(range(1, 1 + chunks)) * (6 // chunks)
    assert negative == [9] * 6


def test_nobody_at_all_may_step() -> None:
    plan = make_plan([], LATENT, shape=StepShape(2, 2, 1), spare=SPARE)
    assert plan.rows == 0
    assert set(plan.arrays["slot"]) == {SPARE}


def test_noise_is_brought_only_where_somebody_draws_it() -> None:
    shape = StepShape(2, 2, 1)
    assert "noise" not in make_plan([placement(slots=(0,))], LATENT, shape=shape, spare=SPARE).arrays
    drawn = make_plan([placement(slots=(0,), scheduler="euler_ancestral")], LATENT, shape=shape, spare=SPARE).arrays
    assert drawn["noise"].shape == (2, *LATENT)
    assert drawn["noise"][0].any()
    assert not drawn["noise"][1].any()


def test_a_full_step_keeps_the_features_of_those_who_ask_and_a_shallow_one_takes_them() -> None:
    features = ((0, 4), (2, 1))
    company = placement(slots=(1,))
    full = make_plan(
        [company, placement(slots=(3, 5), features=features)], LATENT, shape=StepShape(8, 8, 1), spare=SPARE
    )
    assert full.feature_copies == ((2, 0), (3, 4), (4, 2), (5, 1))
    assert "row_feature" not in full.arrays
    due = [placement(slots=(3, 5), features=features, step=1)]
    assert step_shape(due) == StepShape(2, 4, 1, "shallow")
    shallow = make_plan(due, LATENT, shape=StepShape(8, 8, 1, "shallow"), spare=SPARE)
    assert shallow.arrays["row_feature"].tolist() == [0, 4, 2, 1, *[SPARE] * 4]
    assert shallow.feature_copies == ()


def test_the_same_company_keeps_its_seats_while_its_numbers_change() -> None:
    placements, shape = [placement(slots=(3, 5)), placement(slots=(1,), guided=False)], StepShape(8, 8, 1)
    first = make_plan(placements, LATENT, shape=shape, spare=SPARE)
    for one in placements:
        one.request.advance()
    second = make_plan(placements, LATENT, shape=shape, spare=SPARE, before=first.layout)
    assert second.layout is first.layout
    anew = make_plan(placements, LATENT, shape=shape, spare=SPARE)
    for name, array in anew.arrays.items():
        np.testing.assert_array_equal(second.arrays[name], array, err_msg=name)
    assert not np.array_equal(second.arrays["timestep"], first.arrays["timestep"])


@pytest.mark.parametrize("change", ["company", "shape", "guidance"])
def test_another_company_is_seated_anew(change: str) -> None:
    ends_early = replace(placement(slots=(3,)).request.params, guidance_end=0.5)
    request = Request(ends_early, table(Scheduler("ddim"), 4, NoiseSchedule()), (), "a")
    advance(request)
    placements = [replace(placement(slots=(3,)), request=request), placement(slots=(1,))]
    shape = StepShape(8, 8, 1)
    before = make_plan(placements, LATENT, shape=shape, spare=SPARE).layout
    if change == "company":
        placements.pop()
    elif change == "shape":
        shape = StepShape(4, 4, 1)
    else:
        request.advance()
    after = make_plan(placements, LATENT, shape=shape, spare=SPARE, before=before)
    anew = make_plan(placements, LATENT, shape=shape, spare=SPARE)
    assert after.layout is not before
    for name, array in anew.arrays.items():
        np.testing.assert_array_equal(after.arrays[name], array, err_msg=name)
