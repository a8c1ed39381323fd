"""Steps are shared between callers: whoever sends little is slowed by no more than the others are entitled to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.manifest import Size
from server.requests.context import Priority
from server.requests.request import Flow, Request
from server.runtime.batching.batcher import Batcher
from server.runtime.batching.fair_steps import fair_rows
from server.runtime.batching.step_times import Kind
from tests.support.batching import LARGE, SMALL, Seconds, batcher, request, step


def linear(_kind: Kind, rows: int) -> float:
    """Step times of a processor that is busy with one row."""
    return float(rows)


def flat(_kind: Kind, rows: int) -> float:
    """Step times of a GPU, which has room for many rows."""
    return 8 + rows / 100


def greedy(count: int) -> list[Request]:
    return [request(f"greedy {index}", caller="greedy", steps=20) for index in range(count)]


def seconds_until_done(policy: Batcher, wanted: Request, seconds: Seconds) -> float:
    """What the steps take until `wanted` has taken its last."""
    total = 0.0
    while not wanted.denoised:
        batch = step(policy)
        assert batch is not None
        assert batch.requests
        total += seconds((batch.requests[0].params.size, "full"), sum(one.rows for one in batch.requests))
    return total


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("curve", [linear, flat])
def test_one_request_takes_at_most_twice_its_time_alone_and_a_step_against_two_hundred(
    curve: Seconds, size: Size
) -> None:
    polite = request("polite", caller="polite", steps=20, size=size)
    alone = sum(curve((size, "full"), polite.rows) for _ in range(20))
    policy = batcher(*greedy(200), max_rows=8, max_waiting=300, seconds=curve)
    for _ in range(5):
        step(policy)
    policy.submit(polite)
    one_step = curve((SMALL, "full"), 8)
    assert seconds_until_done(policy, polite, curve) <= 2 * alone * 1.05 + one_step


def test_the_device_is_full_where_full_steps_take_hardly_longer() -> None:
    policy = batcher(*greedy(20), max_rows=8, seconds=flat)
    step(policy)
    policy.submit(request("polite", caller="polite", steps=20))
    rows = [sum(one.rows for one in batch.requests) for _ in range(10) if (batch := step(policy))]
    assert rows == [8] * 10


def test_one_caller_alone_has_the_whole_device() -> None:
    policy = batcher(*greedy(20), max_rows=8, seconds=linear)
    rows = [sum(one.rows for one in batch.requests) for _ in range(10) if (batch := step(policy))]
    assert rows == [8] * 10


def test_callers_with_a_request_each_take_every_step_as_far_as_there_are_rows() -> None:
    everyone = [request(name, caller=name, steps=20) for name in "abcdef"]
    policy = batcher(*everyone, max_rows=8, seconds=linear)
    batches = [batch for _ in range(20) if (batch := step(policy))]
    assert all([one.id for one in batch.requests] == list("abcd") for batch in batches)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_callers_with_more_requests_than_rows_share_the_steps(rows: int) -> None:
    """One sends requests of two rows, the other of many: each gets half of the rows, for as long as both run."""
    many = [request(f"many {index}", caller="many", images=rows, steps=40) for index in range(12)]
    few = [request(f"few {index}", caller="few", steps=40) for index in range(12)]
    policy = batcher(*many, *few, max_rows=8, seconds=linear)
    taken: Counter[str] = Counter()
    for _ in range(200):
        batch = step(policy)
        assert batch is not None
        for one in batch.requests:
            taken[one.caller] += one.rows
    assert taken["few"] == pytest.approx(taken["many"], rel=0.25)


def shares(policy: Batcher, steps: int) -> Counter[Priority]:
    taken: Counter[Priority] = Counter()
    for _ in range(steps):
        batch = step(policy)
        assert batch is not None
        for one in batch.requests:
            taken[one.priority] += one.rows
    return taken


@pytest.mark.parametrize("curve", [linear, flat])
def test_an_interactive_request_is_served_before_the_batch_that_waits(curve: Seconds) -> None:
    waiting = [request(f"batch {index}", priority="batch", steps=20) for index in range(50)]
    policy = batcher(*waiting, max_rows=8, seconds=curve)
    step(policy)
    interactive = request("interactive", steps=20)
    policy.submit(interactive)
    assert policy.position(interactive) == 0
    steps = 0
    while not interactive.denoised:
        batch = step(policy)
        assert batch is not None
        steps += 1
    assert steps <= 20 * 9 / 8 + 1


@pytest.mark.parametrize("sizes", [(SMALL, SMALL), (SMALL, LARGE)], ids=["one size", "two sizes"])
def test_a_batch_keeps_a_share_while_interactive_requests_never_end(sizes: Sequence[Size]) -> None:
    policy = batcher(
        *(request(f"batch {n}", priority="batch", steps=40, images=4, size=sizes[0]) for n in range(20)),
        *(request(f"interactive {n}", steps=40, images=4, size=sizes[1]) for n in range(80)),
        max_rows=8,
        seconds=linear,
    )
    taken = shares(policy, 900)
    assert 1 / 14 <= taken["batch"] / taken["interactive"] <= 1 / 5


def test_the_limit_of_rows_follows_the_step_times() -> None:
    few, many = Flow("few", "interactive"), Flow("many", "interactive")
    alone = [{few: 2.0, many: 8.0}]
    assert fair_rows({few: 2, many: 8}, alone, float, max_rows=8) == 4
    assert fair_rows({few: 2, many: 8}, alone, lambda rows: 2 + rows / 100, max_rows=8) == 8
    assert fair_rows({few: 2, many: 8}, alone, lambda _rows: 0.0, max_rows=8) == 8
    assert fair_rows({few: 2, many: 8}, alone, lambda _rows: 100.0, max_rows=8) == 1


@st.composite
def arrivals(draw: st.DrawFn) -> Request:
    isolated = draw(st.booleans())
    return request(
        "",
        caller=draw(st.sampled_from("abc")),
        priority=draw(st.sampled_from(("interactive", "batch"))),
        images=1 if isolated else draw(st.integers(1, 4)),
        steps=draw(st.integers(1, 9)),
        size=draw(st.sampled_from((SMALL, LARGE))),
        guided=draw(st.booleans()),
        isolated=isolated,
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(arrivals(), min_size=1, max_size=40))
def test_every_request_takes_all_its_steps_whatever_shares_the_device(everyone: list[Request]) -> None:
    policy = batcher(max_rows=8, seconds=linear)
    for one in everyone:
        policy.submit(one)
        step(policy)
    policy.close()
    while batch := step(policy):
        assert 0 < sum(one.rows for one in batch.requests) <= 8
        assert len({one.params.size for one in batch.requests}) == 1
    assert all(one.denoised for one in everyone)
    assert (policy.waiting, policy.running) == (0, 0)


def test_a_waiting_request_knows_its_place_and_delay() -> None:
    policy = batcher(max_rows=2, max_waiting=10, seconds=lambda _kind, _rows: 8.0)
    running, *waiting = (request(name, caller="a", steps=5) for name in "abc")
    for one in (running, *waiting):
        policy.submit(one)
    step(policy)
    other = request("other", caller="b", steps=5)
    policy.submit(other)
    assert [policy.position(one) for one in (running, *waiting, other)] == [None, 1, 2, 0]
    assert policy.delay(waiting[1]) == sum(2 / 8 * 8.0 * (one.steps - one.step) for one in (running, waiting[0], other))
    assert policy.delay(running) == 0
