"""Policy: who steps together, who waits, and that nobody waits without end."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest

from engines.contract import MAX_CHUNKS
from server.requests.errors import InvalidRequest, NotReady, QueueFull
from server.requests.request import Request
from server.runtime.batching.batcher import Batch, Batcher
from tests.support.batching import LARGE, SMALL, batcher, request, step


def names(batch: Batch | None) -> list[str]:
    assert batch is not None
    return [item.id for item in batch.requests]


def run_to_end(policy: Batcher, *, steps: int = 1000) -> list[str]:
    """Step until nothing is left, and return the ids in the order they finished."""
    policy.close()
    finished: list[str] = []
    for _ in range(steps):
        batch = policy.next_batch()
        if batch is None:
            return finished
        assert sum(item.rows for item in batch.requests) <= 8
        assert len({item.params.size for item in batch.requests}) <= 1
        for item in batch.requests:
            item.advance()
            if item.denoised:
                policy.leave(item)
                finished.append(item.id)
    raise AssertionError("somebody waits without end")


def test_an_unguided_image_takes_one_row_and_a_guided_one_two() -> None:
    assert request("a", guided=False).rows == 1
    assert request("b", images=3).rows == 6


def test_newcomers_join_between_steps_and_the_finished_leave() -> None:
    long, late = request("long"), request("late")
    policy = batcher(long)
    assert names(policy.next_batch()) == ["long"]
    policy.submit(late)
    batch = policy.next_batch()
    assert names(batch) == ["long", "late"]
    assert batch is not None
    assert batch.joined == (late,)
    policy.leave(long)
    assert names(policy.next_batch()) == ["late"]


def test_newcomers_join_one_by_one_before_the_step_and_no_turn_is_taken() -> None:
    long, first, second = request("long"), request("first"), request("second")
    policy = batcher(long, max_rows=4)
    assert names(policy.next_batch()) == ["long"]
    assert policy.next_newcomer(timeout=0) is None
    policy.submit(first)
    policy.submit(second)
    assert policy.next_newcomer(timeout=60) is first
    assert policy.next_newcomer(timeout=0) is None, "there is no room for two"
    batch = policy.next_batch()
    assert names(batch) == ["long", "first"]
    assert batch is not None
    assert not batch.joined, "it has joined before"


def test_a_newcomer_is_waited_for() -> None:
    late = request("late")
    policy = batcher(request("long"))
    policy.next_batch()
    submitting = threading.Timer(0.05, policy.submit, [late])
    submitting.start()
    assert policy.next_newcomer(timeout=60) is late
    submitting.join()


def test_newcomers_of_the_size_whose_turn_is_next_join() -> None:
    other, large, small = request("other", size=LARGE), request("large", size=LARGE), request("small", size=SMALL)
    policy = batcher(request("first", size=SMALL), other)
    assert names(policy.next_batch()) == ["first"]
    for one in (small, large):
        policy.submit(one)
    assert [policy.next_newcomer(timeout=0) for _ in range(3)] == [other, large, None]
    assert names(policy.next_batch()) == ["other", "large"]


def test_a_step_holds_no_more_rows_than_the_engines() -> None:
    policy = batcher(*(request(str(index), images=2) for index in range(3)), max_rows=8)
    assert names(policy.next_batch()) == ["0", "1"]
    assert policy.waiting == 1


def test_a_small_request_overtakes_a_large_one_that_came_a_little_earlier() -> None:
    running, large, small = request("running", images=3), request("large", images=4), request("small")
    policy = batcher(running, max_rows=8)
    assert names(policy.next_batch()) == ["running"]
    policy.submit(large)
    policy.submit(small)
    assert names(policy.next_batch()) == ["running", "small"]


def test_a_large_request_gets_its_rows_though_small_ones_keep_coming() -> None:
    policy = batcher(request("first", images=3, steps=2), request("large", images=4, steps=6), max_rows=8)
    order: list[str] = []
    for number in range(30):
        policy.submit(request(f"small {number}", images=3, steps=2))
        for _ in range(2):
            batch = step(policy)
            assert batch is not None
            order += [item.id for item in batch.joined]
    assert order.index("large") <= 12


def test_a_short_request_takes_turns_with_long_ones_that_fill_the_rows() -> None:
    long = [request(f"long {index}", steps=200) for index in range(6)]
    policy = batcher(*long, max_rows=4)
    step(policy)
    short = request("short", steps=5)
    policy.submit(short)
    steps = 0
    while not short.denoised:
        batch = step(policy)
        assert batch is not None
        assert sum(item.rows for item in batch.requests) == 4
        steps += 1
    assert steps <= 10
    assert all(item.step > 1 for item in long[:2])
    assert policy.waiting == 4
    assert len(run_to_end(policy, steps=2000)) == 6


def test_a_long_request_waits_for_rows_rather_than_take_turns() -> None:
    policy = batcher(*(request(str(index), steps=20) for index in range(3)), max_rows=4)
    assert names(step(policy)) == ["0", "1"]
    assert policy.waiting == 1


@pytest.mark.parametrize(
    "long",
    [
        {"guided": False},  # each image has one row, so that all slots are taken
        {"chunks": MAX_CHUNKS},  # embeddings
        {"cache": "fast"},  # features, by row
    ],
)
def test_no_more_requests_take_turns_than_the_memory_holds(long: dict[str, Any]) -> None:
    rows = 1 if long.get("guided") is False else 2
    policy = batcher(*(request(str(index), steps=200, **long) for index in range(8 // rows)), max_rows=8)
    assert len(names(step(policy))) == 8 // rows
    policy.submit(request("short", steps=5, **long))
    step(policy)
    assert policy.waiting == 1


def test_a_caller_who_fills_the_queue_leaves_places_to_others() -> None:
    policy = batcher(*(request(str(index), caller="greedy") for index in range(8)), max_waiting=8)
    policy.submit(request("polite", caller="polite"))
    for caller in ("greedy", "polite"):  # who has one waiting has no claim to a reserved place
        with pytest.raises(QueueFull):
            policy.check(caller)
        with pytest.raises(QueueFull):
            policy.submit(request("one more", caller=caller))
    policy.check("another")
    policy.submit(request("another", caller="another"))
    with pytest.raises(QueueFull, match="10 requests are waiting"):
        policy.submit(request("late", caller="late"))


def test_a_polite_caller_is_served_before_most_of_a_greedy_ones_requests() -> None:
    policy = batcher(*(request(f"greedy {index}", caller="greedy") for index in range(20)), max_rows=4)
    step(policy)
    policy.submit(request("polite", caller="polite"))
    assert run_to_end(policy).index("polite") <= 4


def test_sizes_take_turns() -> None:
    policy = batcher(request("a"), request("b", size=LARGE), request("c"))
    assert [names(policy.next_batch()) for _ in range(4)] == [["a", "c"], ["b"], ["a", "c"], ["b"]]


def test_everybody_finishes_whatever_the_mix() -> None:
    crowd = [
        request(
            str(index), images=1 + index % 4, guided=index % 3 > 0, size=(SMALL, LARGE)[index % 2], steps=1 + index % 7
        )
        for index in range(60)
    ]
    assert sorted(run_to_end(batcher(*crowd)), key=int) == [str(index) for index in range(60)]


def test_a_short_request_finishes_before_a_long_one_that_came_first() -> None:
    assert run_to_end(batcher(request("long", steps=50), request("short", steps=4))) == ["short", "long"]


def test_the_cancelled_leave_at_the_next_step_whether_they_run_or_wait() -> None:
    running, waiting, stays = request("running", images=4), request("waiting"), request("stays")
    policy = batcher(running, waiting, stays)
    policy.next_batch()
    running.cancel()
    waiting.cancel()
    batch = policy.next_batch()
    assert batch is not None
    assert set(batch.left) == {running, waiting}
    assert batch.requests == (stays,)


def test_a_request_cancelled_at_any_moment_is_never_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks whether it is cancelled may hear no now and yes the next time: it must leave then, or later."""
    for moment in range(1, 6):
        answers = iter([False] * moment + [True] * 100)
        monkeypatch.setattr(Request, "cancelled", property(partial(next, answers)))
        only = request("only")
        policy = batcher(only)
        policy.close()
        handed_over: list[Request] = []
        while batch := policy.next_batch():
            handed_over += batch.left
        assert handed_over == [only]


def test_the_last_one_cancelled_is_still_handed_over() -> None:
    only = request("only")
    policy = batcher(only)
    policy.next_batch()
    only.cancel()
    policy.close()
    batch = policy.next_batch()
    assert batch is not None
    assert batch.left == (only,)
    assert policy.next_batch() is None


def test_what_can_never_fit_is_refused_with_both_numbers() -> None:
    with pytest.raises(InvalidRequest, match=r"10 UNet rows.*take 8"):
        batcher(max_rows=8).submit(request("a", images=5))


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    policy = batcher(request("a"), request("b"), max_waiting=2)
    with pytest.raises(QueueFull) as refused:
        policy.submit(request("c"))
    assert refused.value.retry_after is not None
    assert 1 <= refused.value.retry_after <= 120


def test_a_closed_batcher_takes_nobody_in() -> None:
    policy = batcher()
    policy.close()
    assert policy.next_batch() is None
    with pytest.raises(NotReady):
        policy.submit(request("a"))


def test_submit_wakes_the_executor() -> None:
    policy = batcher()
    taken: list[list[str]] = []
    thread = threading.Thread(target=lambda: taken.append(names(policy.next_batch())))
    thread.start()
    policy.submit(request("a"))
    thread.join(10)
    assert taken == [["a"]]


def test_evicted_requests_are_handed_over_once() -> None:
    first, second = request("a", images=4), request("b")
    policy = batcher(first, second)
    policy.next_batch()
    assert set(policy.evict()) == {first, second}
    assert policy.evict() == ()
    assert (policy.running, policy.waiting) == (0, 0)


def test_who_shares_with_nobody_takes_turns_with_those_who_share() -> None:
    policy = batcher(request("a"), request("alone", isolated=True), request("b"), request("recluse", isolated=True))
    turns = [names(policy.next_batch()) for _ in range(6)]
    assert turns == [["a", "b"], ["alone"], ["recluse"]] * 2


def test_who_shares_with_nobody_holds_rows_like_everyone() -> None:
    policy = batcher(
        request("a", images=3, steps=2), request("alone", isolated=True, steps=7), request("late", steps=9)
    )
    first = policy.next_batch()
    assert first is not None
    assert [item.id for item in first.joined] == ["a", "alone"]
    for item in first.requests:
        item.advance()
    assert run_to_end(policy) == ["a", "alone", "late"]


def test_full_and_shallow_steps_take_turns() -> None:
    """Full steps of a cached request are shared with those who cache nothing; its shallow ones are its own."""
    cached = request("cached", steps=10, cache="fast")
    policy = batcher(request("plain", steps=10), cached)
    assert set(cached.depths) == {"full", "shallow"}
    for depth in cached.depths:
        if depth == "full":
            assert names(step(policy)) == ["plain", "cached"]
        else:
            assert [names(step(policy)) for _ in range(2)] == [["plain"], ["cached"]]
