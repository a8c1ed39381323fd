"""The order of waiting requests: equal shares for callers, short ones early, and a bound on what may overtake."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.manifest import NoiseSchedule, Size
from engines.schedulers import Scheduler, table
from server.requests.context import Caller, RequestContext
from server.requests.params import GenerationParams
from server.requests.request import Flow, Request
from server.requests.tokenizer import Prompt
from server.runtime.batching.fair_queue import FairQueue

SIZE, PROMPT, EULER = Size(width=64, height=64), Prompt("", ()), Scheduler("euler")
TABLES = {steps: table(EULER, steps, NoiseSchedule()) for steps in (1, 2, 5, 8, 20, 40)}


def request(name: str, *, caller: str = "", steps: int = 5) -> Request:
    """An unguided image: its work is its steps."""
    params = GenerationParams(PROMPT, PROMPT, SIZE, EULER, steps, 1.0, (0,))
    return Request(params, TABLES[steps], (), name, RequestContext(Caller(caller)))


def queue(*requests: Request) -> FairQueue:
    made = FairQueue()
    for item in requests:
        made.push(item)
    return made


def names(waiting: FairQueue, count: int | None = None) -> list[str]:
    return [waiting.pop().id for _ in range(len(waiting) if count is None else count)]


def test_equal_requests_keep_their_order_whoever_sends_them() -> None:
    assert names(queue(*(request(name) for name in "abcd"))) == list("abcd")
    assert names(queue(*(request(name, caller=name) for name in "dbca"))) == list("dbca")


def test_a_short_request_goes_first_whether_of_the_same_caller_or_of_another() -> None:
    assert names(queue(request("long", steps=40), request("short", steps=2))) == ["short", "long"]
    waiting = queue(request("long", steps=40, caller="a"), request("short", steps=2, caller="b"))
    assert names(waiting) == ["short", "long"]


@pytest.mark.parametrize("callers", [1, 10], ids=["one caller", "many callers"])
def test_a_long_request_is_served_when_it_would_be_done_if_it_had_shared_the_device(callers: int) -> None:
    """It takes 40 steps and waits with one short one at a time: half of the work done counts for it."""
    waiting = queue(request("long", steps=40))
    for number in range(30):
        waiting.push(request(f"short {number}", steps=8, caller=str(number % callers) if callers > 1 else ""))
        served = waiting.pop()
        if served.id == "long":
            assert 7 <= number <= 10
            return
        waiting.advance(served.work, [served])
    raise AssertionError("the long request is never served")


def test_a_caller_with_hundreds_is_served_though_new_callers_keep_coming() -> None:
    waiting = queue(*(request(f"many {index}", caller="many") for index in range(200)))
    for item in [waiting.pop() for _ in range(20)]:
        waiting.advance(item.work, [item])
    served = []
    for number in range(40):
        waiting.push(request(f"new {number}", caller=f"new {number}"))
        served.append(waiting.pop())
        waiting.advance(served[-1].work, [served[-1]])
    assert 4 <= sum(item.caller == "many" for item in served) <= 25


def test_callers_have_equal_shares_of_the_work() -> None:
    """One sends short requests, the other long ones: in any stretch each gets about the same steps."""
    short = [request(f"s{index}", caller="short", steps=5) for index in range(80)]
    long = [request(f"l{index}", caller="long", steps=40) for index in range(10)]
    waiting = queue(*short, *long)
    work = Counter[str]()
    for _ in range(45):
        served = waiting.pop()
        work[served.caller] += served.steps
        assert abs(work["short"] - work["long"]) <= 45


def test_a_caller_who_comes_later_has_neither_debt_nor_credit() -> None:
    waiting = queue(*(request(f"early {index}", caller="early") for index in range(10)))
    for item in [waiting.pop() for _ in range(5)]:
        waiting.advance(item.work, [item])
    for index in range(3):
        waiting.push(request(f"late {index}", caller="late"))
    assert names(waiting, 6) == ["early 5", "late 0", "early 6", "late 1", "early 7", "late 2"]


def test_the_count_of_a_caller_and_the_queue_are_empty_again() -> None:
    first, second = request("a", caller="x"), request("b", caller="x")
    waiting = queue(first, second)
    assert (waiting.count(first.flow), waiting.count(Flow("y", "interactive")), len(waiting)) == (2, 0, 2)
    waiting.discard({first})
    assert names(waiting) == ["b"]
    assert (waiting.count(first.flow), len(waiting), list(waiting)) == (0, 0, [])


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(sorted(TABLES)), st.integers(0, 2)), min_size=1, max_size=60
    )
)
def test_every_request_is_served_once_in_any_interleaving(arrivals: list[tuple[str, int, int]]) -> None:
    waiting = FairQueue()
    served: list[str] = []
    for number, (caller, steps, pops) in enumerate(arrivals):
        waiting.push(request(str(number), caller=caller, steps=steps))
        served += names(waiting, min(pops, len(waiting)))
    served += names(waiting)
    assert sorted(served, key=int) == [str(number) for number in range(len(arrivals))]


def test_the_next_request_of_any_flow_is_served_out_of_turn_and_paid_for() -> None:
    waiting = queue(request("a", caller="a"), request("b", caller="b", steps=8), request("c", caller="b", steps=8))
    assert [item.id for item in waiting.heads()] == ["a", "b"]
    assert waiting.pop(waiting.heads()[1]).id == "b"
    waiting.push(request("d", caller="a", steps=8))
    assert names(waiting) == ["a", "d", "c"]
