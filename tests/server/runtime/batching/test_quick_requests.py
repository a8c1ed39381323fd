"""Requests of few steps do not wait for the steps of long ones, which all go on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.requests.request import Request
from server.runtime.batching.batcher import Batcher
from server.runtime.batching.quick_requests import QuickRequests, StepLimits
from server.runtime.batching.step_times import Kind
from tests.support.batching import LARGE, SMALL, batcher, request, step


def linear(_kind: Kind, rows: int) -> float:
    """Step times of a processor that is busy with one row."""
    return 1.0 + 4.0 * rows


def flat(_kind: Kind, rows: int) -> float:
    """Step times of a GPU, which has room for many rows."""
    return 8 + rows / 100


def quick(name: str = "quick", *, caller: str = "") -> Request:
    return request(name, steps=1, guided=False, caller=caller)


def long(count: int, *, guided: bool = True, caller: str = "", steps: int = 30) -> list[Request]:
    return [request(f"long {n}", steps=steps, guided=guided, caller=caller) for n in range(count)]


def steps_until_done(policy: Batcher, wanted: Request) -> list[int]:
    """The rows of the steps up to its last."""
    rows = []
    while not wanted.denoised:
        batch = step(policy)
        assert batch is not None
        rows.append(sum(one.rows for one in batch.requests))
        assert len(rows) < 1000, "it waits without end"
    return rows


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("callers", [("", ""), ("few", "many")])
def test_one_step_is_taken_at_once_and_is_brief(guided: bool, callers: tuple[str, str]) -> None:
    """Of a full batch, whose every row and, without guidance, every slot is taken but those that are left free."""
    policy = batcher(max_rows=8, seconds=linear)
    policy.submit(quick("before"))
    step(policy)
    for one in long(20, guided=guided, caller=callers[1]):
        policy.submit(one)
    for _ in range(7):
        step(policy)
    late = quick(caller=callers[0])
    policy.submit(late)
    (rows,) = steps_until_done(policy, late)
    assert rows <= 4


def test_steps_of_long_requests_are_brief_only_while_quick_ones_are_expected() -> None:
    policy = batcher(quick(), *long(60, steps=200), max_rows=8, seconds=linear)
    rows = [sum(one.rows for one in batch.requests) for _ in range(1100) if (batch := step(policy))]
    assert max(rows[2:900]) < 8
    assert set(rows[1010:1050]) == {8}


def test_quick_requests_alone_take_full_steps() -> None:
    policy = batcher(*(quick(str(index)) for index in range(40)), max_rows=8, seconds=linear)
    rows = [sum(one.rows for one in batch.requests) for _ in range(5) if (batch := step(policy))]
    assert rows == [8] * 5


def test_steps_stay_full_where_that_takes_hardly_longer() -> None:
    policy = batcher(quick(), *long(20), max_rows=8, seconds=flat)
    rows = [sum(one.rows for one in batch.requests) for _ in range(20) if (batch := step(policy))]
    assert min(rows[1:]) >= 7


def test_long_requests_go_on_however_many_quick_ones_come() -> None:
    """Of two steps, one begins with the request that waited longest, and at most eight have slots."""
    slow = long(2)
    policy = batcher(*slow, max_rows=8, seconds=linear, max_waiting=2000)
    for index in range(2 * 8 * 30):
        for number in range(4):
            policy.submit(quick(f"quick {index} {number}"))
        step(policy)
    assert all(one.denoised for one in slow)


def test_a_request_for_all_slots_joins_though_quick_ones_of_others_keep_coming() -> None:
    policy = batcher(quick("before"), *long(4), max_rows=8, seconds=linear, max_waiting=1000)
    step(policy)
    large = request("large", steps=30, guided=False, images=8, caller="large")
    policy.submit(large)
    for index in range(400):
        policy.submit(quick(f"quick {index}", caller="few"))
        step(policy)
    assert large.denoised


def test_the_limits_follow_the_step_times() -> None:
    expected, alone = QuickRequests(), quick()
    assert expected.limits(float, max_rows=16) == StepLimits(16, 16), "none is expected"
    expected.came(alone, 3.5)
    assert expected.limits(float, max_rows=16) == StepLimits(3, 3)
    assert expected.limits(lambda rows: 2.0 + rows, max_rows=16) == StepLimits(4, 11), "2 + 16 rows in 18 s"
    assert expected.limits(lambda _rows: 0.0, max_rows=16) == StepLimits(16, 16)
    assert expected.limits(lambda _rows: 3.5, max_rows=16) == StepLimits(16, 16)
    assert expected.limits(lambda _rows: 4.0, max_rows=16) == StepLimits(12, 16), (
        "full steps take as long as short ones"
    )


def test_a_request_about_as_quick_keeps_the_quickest_in_mind_and_a_long_one_does_not() -> None:
    expected = QuickRequests()
    first, similar, slow = quick("first"), quick("similar"), quick("slow")
    expected.came(first, 1.0)
    expected.came(slow, 9.0)
    assert expected.among([first, slow]) == {first}
    for _ in range(900):
        expected.stepped()
    expected.came(similar, 1.2)
    for _ in range(900):
        expected.stepped()
    assert expected.expected
    for _ in range(101):
        expected.stepped()
    assert not expected.expected


@st.composite
def arrivals(draw: st.DrawFn) -> Request:
    isolated = draw(st.booleans()) and draw(st.booleans())
    return request(
        "",
        caller=draw(st.sampled_from("abc")),
        images=1 if isolated else draw(st.integers(1, 4)),
        steps=draw(st.sampled_from((1, 1, 1, 2, 4, 30))),
        size=draw(st.sampled_from((SMALL, LARGE))),
        guided=draw(st.booleans()),
        isolated=isolated,
        cache=draw(st.sampled_from(("off", "fast", "faster"))),
        loras=draw(st.sampled_from(({}, {"a": 4}, {"a": 4, "b": 8}, {"c": 8}))),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(arrivals(), st.booleans()), min_size=1, max_size=40), st.sampled_from((linear, flat)))
def test_every_request_takes_all_its_steps_and_rows_and_memory_are_never_exceeded(
    everyone: list[tuple[Request, bool]], seconds: Callable[[Kind, int], float]
) -> None:
    policy = batcher(max_rows=8, lora_ranks=12, seconds=seconds)
    running: set[Request] = set()

    def take() -> bool:
        if not (batch := policy.next_batch(timeout=0)):
            return False
        running.update(batch.joined)
        running.difference_update(batch.left)
        assert batch.requests or not running
        assert sum(one.rows for one in batch.requests) <= 8
        assert len({(one.params.size, one.depth) for one in batch.requests}) <= 1
        for size in (SMALL, LARGE):
            assert sum(one.images for one in running if one.params.size == size) <= 8
        for one in batch.requests:
            one.advance()
            if one.denoised:
                policy.leave(one)
                running.discard(one)
        return True

    for number, (one, cancels) in enumerate(everyone):
        policy.submit(one)
        take()
        if cancels and number % 3 == 0:
            one.cancel()
    policy.close()
    for _ in range(10_000):
        if not take():
            break
    assert all(one.denoised or one.cancelled for one, _ in everyone)
    assert (policy.waiting, policy.running) == (0, 0)
