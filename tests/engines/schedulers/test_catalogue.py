"""What a scheduler leaves open is completed from a model's defaults, and given timesteps are those of diffusers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engines.manifest import Defaults, NoiseSchedule
from engines.schedulers import Scheduler, complete, find, table
from tests.support.stepping import apart, run_diffusers, run_table

SD1 = NoiseSchedule(steps_offset=1, set_alpha_to_one=False)
PUBLISHED: dict[str, tuple[int, ...]] = {
    "one": (800,),
    "half": (399,),
    "four": (999, 749, 499, 249),
    "to-the-end": (999, 500, 0),
}


@pytest.mark.parametrize("timesteps", PUBLISHED.values(), ids=PUBLISHED.keys())
@pytest.mark.parametrize("eta", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_given_timesteps_are_stepped_through_as_diffusers_does(
    name: str, skip: int, eta: float | None, timesteps: tuple[int, ...]
) -> None:
    if skip >= len(timesteps) or (name == "lcm" and eta is not None):
        return
    scheduler = replace(find(name, eta=eta), timesteps=timesteps)
    ours = run_table(scheduler, len(timesteps), SD1, skip=skip)
    theirs = run_diffusers(scheduler, len(timesteps), SD1, skip=skip)
    assert ours.timesteps == theirs.timesteps == list(timesteps[skip:])
    assert ours.draws == theirs.draws
    np.testing.assert_allclose(ours.levels, theirs.levels, rtol=1e-5, atol=1e-9)
    assert all(apart(mine, expected) < 1e-5 for mine, expected in zip(ours.xs, theirs.xs, strict=True))


@pytest.mark.parametrize(
    ("timesteps", "steps"),
    [((), 1), ((800,), 2), ((249, 499), 2), ((500, 500), 2), ((1000,), 1), ((10, -1), 2)],
)
def test_timesteps_that_cannot_be_stepped_through_are_refused(timesteps: tuple[int, ...], steps: int) -> None:
    with pytest.raises(ValueError, match=f"choose {steps}, falling, from 999 to 0"):
        table(Scheduler("lcm", timesteps=timesteps), steps, SD1)


def test_methods_that_space_timesteps_themselves_take_none() -> None:
    with pytest.raises(ValueError, match="euler has no timesteps of one's choice"):
        table(Scheduler("euler", timesteps=(800,)), 1, SD1)


LIGHTNING = Defaults(scheduler="euler", num_inference_steps=4, timestep_spacing="trailing")
HYPER = Defaults(scheduler="tcd", num_inference_steps=1, eta=1.0)
FIXED = Defaults(scheduler="lcm", num_inference_steps=1, timesteps=(800,))


@pytest.mark.parametrize(
    ("defaults", "asked", "steps", "filled_in"),
    [
        (LIGHTNING, find("euler"), 4, {"timestep_spacing": "trailing"}),
        (LIGHTNING, find("ddim"), 4, {"timestep_spacing": "trailing"}),
        (LIGHTNING, find("euler_karras"), 9, {"timestep_spacing": "trailing"}),
        (LIGHTNING, find("euler", timestep_spacing="leading"), 4, {}),
        (LIGHTNING, find("lcm"), 4, {}),
        (HYPER, find("tcd"), 8, {"eta": 1.0}),
        (HYPER, find("tcd", eta=0.0), 1, {}),
        (HYPER, find("ddim"), 1, {}),
        (FIXED, find("lcm"), 1, {"timesteps": (800,)}),
        (FIXED, find("lcm"), 2, {}),
        (FIXED, find("tcd"), 1, {}),
    ],
)
def test_what_is_left_open_is_as_by_default_where_the_method_has_it(
    defaults: Defaults, asked: Scheduler, steps: int, filled_in: dict[str, Any]
) -> None:
    assert complete(asked, defaults, num_steps=steps) == replace(asked, **filled_in)
    assert table(complete(asked, defaults, num_steps=steps), steps, SD1).steps
