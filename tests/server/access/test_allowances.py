"""Requests in a time, and at once, of each caller."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

from server.access.allowances import Allowances, Place
from server.access.rates import Rates
from server.requests.context import Allowance, Caller
from server.requests.errors import Cancelled, RateLimited
from server.requests.request import Event, Failed, Request, Started

ALICE, BOB = Caller("alice"), Caller("bob")
REQUEST = cast(Request, None)


def take(allowances: Allowances, caller: Caller) -> Place:
    place = allowances.take(caller)
    assert place is not None
    return place


def refusal(allowances: Allowances, caller: Caller) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        allowances.check(caller)
    with pytest.raises(RateLimited):
        allowances.take(caller)
    return caught.value


def test_without_limits_nothing_is_counted() -> None:
    allowances = Allowances()
    for _ in range(1000):
        allowances.check(ALICE)
        assert allowances.take(ALICE) is None
    assert allowances.at_once("alice") == 0


def test_a_caller_has_so_many_requests_at_once_and_others_have_theirs() -> None:
    allowances = Allowances(Allowance(concurrency=2))
    first, _ = take(allowances, ALICE), take(allowances, ALICE)
    assert refusal(allowances, ALICE).retry_after == 1
    take(allowances, BOB)
    first.give_back()
    take(allowances, ALICE)
    refusal(allowances, ALICE)


def test_a_place_is_given_back_once() -> None:
    allowances = Allowances(Allowance(concurrency=5))
    place, _ = take(allowances, ALICE), take(allowances, ALICE)
    place.on_event(REQUEST, Started())
    assert allowances.at_once("alice") == 2
    for _ in range(3):
        place.on_event(REQUEST, Failed(Cancelled("gone")))
        place.give_back()
    assert allowances.at_once("alice") == 1


def test_a_listener_that_fails_keeps_no_place() -> None:
    allowances = Allowances(Allowance(concurrency=1))
    place = take(allowances, ALICE)

    def broken(_request: Request, _event: Event) -> None:
        raise RuntimeError("broken")

    request = Request(cast(Any, None), cast(Any, None), (broken, place.on_event), "an id")
    for _ in range(2):
        request.finish(Failed(Cancelled("gone")))
    assert allowances.at_once("alice") == 0


def test_any_thread_may_give_places_back() -> None:
    allowances = Allowances(Allowance(concurrency=2000))
    places = [take(allowances, caller) for caller in (ALICE, BOB) for _ in range(500)]
    start = threading.Barrier(8)

    def give_all_back() -> None:
        start.wait()
        for place in places:
            place.give_back()

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(give_all_back) for _ in range(8)]:
            done.result()
    assert (allowances.at_once("alice"), allowances.at_once("bob")) == (0, 0)


def test_a_rate_says_when_the_next_request_fits() -> None:
    allowances = Allowances(Allowance(rate="3/minute"))
    before = time.time()
    for _ in range(3):
        assert allowances.take(ALICE) is None
    refused = refusal(allowances, ALICE)
    assert refused.retry_after is not None
    assert 60 - (time.time() - before) - 1 <= refused.retry_after <= 60
    allowances.take(BOB)


def test_the_window_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    allowances = Allowances(Allowance(rate="1/second"))
    allowances.take(ALICE)
    assert refusal(allowances, ALICE).retry_after == 1
    now += 0.9
    assert refusal(allowances, ALICE).retry_after == 1
    now += 0.2
    allowances.take(ALICE)


def test_refusals_do_not_count() -> None:
    allowances = Allowances(Allowance(rate="2/minute", concurrency=1))
    place = take(allowances, ALICE)
    for _ in range(5):
        refusal(allowances, ALICE)
    place.give_back()
    take(allowances, ALICE)


def test_a_callers_own_allowance_comes_first() -> None:
    allowances = Allowances(Allowance(rate="1/minute", concurrency=1))
    more = Caller("carol", allowance=Allowance("100/minute", 3))
    for _ in range(3):
        take(allowances, more)
    refusal(allowances, more)
    other = Caller("dave", allowance=Allowance(concurrency=9))  # the rate is the default
    take(allowances, other)
    assert "1/minute" in refusal(allowances, other).detail


def test_ever_new_callers_take_no_more_memory() -> None:
    rates = Rates()
    for number in range(5000):
        assert rates.count("5/minute", f"caller {number}")
    assert rates.known <= 1024
    assert rates.wait("1/minute", "caller 4999") == 0, "another rate is another window"
    for _ in range(4):
        rates.count("5/minute", "caller 4999")
    assert rates.wait("5/minute", "caller 4999") > 0, "the last callers are known"
    assert rates.wait("5/minute", "caller 0") == 0
