"""The steps of a request."""

from __future__ import annotations

from collections import Counter

import pytest

from engines.manifest import NoiseSchedule, Size
from engines.schedulers import Scheduler, table
from server.requests.depths import Cache
from server.requests.params import GenerationParams
from server.requests.request import Request
from server.requests.tokenizer import Prompt

NOTHING = Prompt("", ())


def request(
    *,
    steps: int = 8,
    cache: Cache = "fast",
    full: int | None = None,
    start: float = 0.0,
    end: float = 1.0,
    scale: float = 7.5,
    scheduler: str = "ddim",
) -> Request:
    size, method = Size(width=64, height=64), Scheduler(scheduler)
    params = GenerationParams(
        NOTHING,
        NOTHING,
        size,
        method,
        steps,
        scale,
        (0,),
        guidance_start=start,
        guidance_end=end,
        cache=cache,
        full_steps=full,
    )
    return Request(params, table(method, steps, NoiseSchedule()), (), "a")


def depths(asked: Request) -> str:
    return "".join(depth[0] for depth in asked.depths)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (request(cache="off"), "ffffffff"),
        (request(), "fffsfsfs"),
        (request(steps=20), "fsfsfsssfssssfssssfs"),
        (request(steps=20, cache="faster"), "fsfssfsssssfssssssfs"),
        (request(scale=1), "fffsfsfs"),
        (request(steps=5), "ffffs"),
        (request(steps=4), "ffff"),
        (request(steps=4, cache="faster"), "ffff"),
        (request(steps=1), "f"),
        (request(full=2), "fsfsssss"),
        (request(full=8), "ffffffff"),
        (request(full=1), "fsssssss"),
        (request(full=2, steps=4, cache="off"), "ffss"),
        # Two UNet calls for each step but the last: full ones are as large a share of them.
        (request(full=4, scheduler="heun"), "ffsfsfsfsfsfsfs"),
        # Fresh noise at each step: more of them are full, evenly.
        (request(steps=20, scheduler="euler_ancestral"), "fssfssfssfssfssfssfs"),
        (request(steps=40, scheduler="euler_ancestral", cache="faster"), "fsssfssfssfsssfssfssfsssfssfssfsssfssfss"),
        # Solvers that extrapolate: more of them are, and the last three.
        (request(steps=20, scheduler="dpmpp_2m_sde"), "fsfsfsfsfsfsfsfsffff"),
        (request(steps=20, scheduler="dpmpp_3m_sde", cache="faster"), "fsfsfsfsfsfsfsfsffff"),
        (request(steps=20, scheduler="deis"), "fssfssssfssssssssfff"),
        (request(steps=20, scheduler="deis", cache="faster"), "fssfssssfssssssssfff"),
        # Guidance begins at step 4: step 3 kept no features of the negative prompt.
        (request(start=0.5, full=4), "ffsffsfs"),
        # It ends after step 3: what was kept for both rows serves the one that is left.
        (request(end=0.5, full=4), "ffsfssfs"),
        (request(start=0.25, end=0.375, full=4), "ffffssfs"),
    ],
)
def test_a_step_is_full_where_features_are_due_or_unknown(asked: Request, expected: str) -> None:
    assert depths(asked) == expected


def test_no_shallow_step_lacks_the_features_of_a_row() -> None:
    """Walked as the pipeline does: a full step keeps the features of the rows it has."""
    for start in range(10):
        for end in range(start + 1, 11):
            asked = request(steps=10, start=start / 10, end=end / 10)
            kept = 0
            for step in range(asked.steps):
                assert asked.step == step
                rows = 2 if asked.guided[step] else 1
                if asked.depth == "full":
                    kept = rows
                assert rows <= kept, (start, end, step)
                asked.advance()


def test_the_remaining_steps_decrease() -> None:
    asked = request(steps=7)
    assert asked.steps_left == Counter(full=5, shallow=2)
    for _ in range(4):
        asked.advance()
    assert asked.steps_left == Counter(full=2, shallow=1)


def test_steps_that_are_left_out_do_not_count() -> None:
    """As with an initial image, which leaves out the first steps: half of those that are left."""
    asked = request(steps=20)
    part = Request(asked.params, table(asked.params.scheduler, 20, NoiseSchedule(), skip=10), (), "a")
    assert (asked.steps_left["full"], part.steps_left["full"]) == (6, 5)
