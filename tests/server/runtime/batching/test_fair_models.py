"""Two models under load share the device's time, however long their steps take."""

from __future__ import annotations

from collections import Counter

import pytest

from server.requests.context import Priority
from server.requests.errors import ModelNotLoaded
from server.requests.request import Request
from server.runtime.batching.batcher import Batcher
from server.runtime.batching.fair_models import FairModels
from tests.support.batching import LARGE, SMALL, KnownTimes, request, step

SECONDS = {"quick": 0.01, "slow": 0.1}


def policy(**seconds: float) -> Batcher:
    made = Batcher(max_waiting=1000)
    for model, taken in (seconds or SECONDS).items():
        made.add(model, max_rows=8, step_times=KnownTimes(lambda _kind, _rows, taken=taken: taken))  # type: ignore[misc]
    return made


def crowd(model: str, count: int, *, priority: Priority = "interactive", steps: int = 200) -> list[Request]:
    return [
        request(f"{model} {index}", model=model, caller=model, steps=steps, priority=priority) for index in range(count)
    ]


def times(made: Batcher, steps: int) -> dict[str, float]:
    """The seconds that each model had of the device."""
    taken = dict.fromkeys(SECONDS, 0.0)
    for _ in range(steps):
        batch = step(made)
        assert batch is not None
        assert len({one.batch_key for one in batch.requests}) == 1
        model = batch.requests[0].params.model
        taken[model] += SECONDS[model]
    return taken


def test_a_model_whose_steps_take_ten_times_as_long_has_as_much_of_the_device() -> None:
    made = policy()
    for one in (*crowd("quick", 12), *crowd("slow", 12)):
        made.submit(one)
    taken = times(made, 330)
    assert taken["slow"] == pytest.approx(taken["quick"], rel=0.05)


def test_a_model_of_batch_requests_keeps_an_eighth_of_what_the_other_has() -> None:
    made = policy()
    for one in (*crowd("quick", 12), *crowd("slow", 12, priority="batch")):
        made.submit(one)
    taken = times(made, 400)
    assert taken["slow"] == pytest.approx(taken["quick"] / 8, rel=0.3)


def test_who_asks_for_one_step_at_a_time_has_no_more_than_half_of_the_device() -> None:
    """A slow model without requests between its steps: what it had is not forgotten."""
    made, taken = policy(), dict.fromkeys(SECONDS, 0.0)
    for one in crowd("quick", 12):
        made.submit(one)
    for index in range(330):
        if made.is_idle("slow"):
            made.submit(request(f"slow {index}", model="slow", steps=1))
        taken = {model: taken[model] + seconds for model, seconds in times(made, 1).items()}
    assert taken["slow"] == pytest.approx(taken["quick"], rel=0.1)


def test_a_model_that_was_alone_owes_nothing_and_the_other_has_no_credit() -> None:
    made = policy()
    for one in crowd("slow", 12):
        made.submit(one)
    times(made, 300)
    for one in crowd("quick", 12):
        made.submit(one)
    taken = times(made, 110)
    assert taken["slow"] == pytest.approx(taken["quick"], rel=0.15)


def test_the_sizes_of_a_model_share_its_time_and_not_that_of_others() -> None:
    made = policy(a=0.1, b=0.1)
    sizes = (SMALL, LARGE)
    for number, size in enumerate(sizes):
        made.submit(request(f"a {number}", model="a", size=size, steps=200))
    made.submit(request("b", model="b", steps=200))
    turns = Counter(batch.requests[0].batch_key for _ in range(200) if (batch := step(made)))
    assert sorted(turns.values()) == [50, 50, 100]


def test_models_of_which_nothing_is_known_take_turns() -> None:
    made = policy(a=0.0, b=0.0)
    for model in "ab":
        made.submit(request(model, model=model, steps=100))
    ids = [batch.requests[0].id for _ in range(6) if (batch := step(made))]
    assert ids == list("abababab"[:6])


def test_a_refused_model_leaves_others_and_what_was_accepted() -> None:
    made = policy()
    made.submit(request("before", model="slow", steps=2))
    assert not made.refuse_idle("slow", "it is needed")
    made.refuse("slow", "slow is unloaded: choose quick.")
    with pytest.raises(ModelNotLoaded, match="choose quick"):
        made.submit(request("after", model="slow"))
    made.submit(request("other", model="quick", steps=1))
    made.submit(request("test", model="slow", steps=1), proves=True)
    made.close()
    ended = set()
    while batch := step(made):
        ended |= {one.id for one in batch.requests if one.denoised}
    assert ended == {"before", "other", "test"}
    assert made.is_idle("slow")
    made.accept("slow")


def test_rows_are_counted_by_model() -> None:
    made = Batcher(max_waiting=10)
    made.add("small", max_rows=2)
    made.add("large", max_rows=8)
    for model in ("small", "large"):
        for number in range(4):
            made.submit(request(f"{model} {number}", model=model, steps=9))
    rows = {}
    for _ in range(2):
        batch = step(made)
        assert batch is not None
        rows[batch.requests[0].params.model] = sum(one.rows for one in batch.requests)
    assert rows == {"small": 2, "large": 8}


def test_shares_begin_anew_when_nothing_is_asked_for() -> None:
    shares = FairModels()
    shares.serve("a", 100)
    shares.reset()
    assert shares.next(["a", "b"]) == "a"
