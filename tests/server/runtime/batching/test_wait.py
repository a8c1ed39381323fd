"""How long a request would wait if it came now."""

from __future__ import annotations

import random

import pytest

from server.requests.request import Request
from tests.support.batching import LARGE, batcher, request, step


def test_an_idle_server_lets_nobody_wait() -> None:
    assert batcher(seconds=lambda _kind, _rows: 1.0).wait_of(request("a")) == 0


def test_a_newcomer_whose_rows_are_free_does_not_wait() -> None:
    policy = batcher(request("a", steps=100), seconds=lambda _kind, _rows: 1.0)
    step(policy)
    assert policy.wait_of(request("b", images=3)) == 0
    assert policy.wait_of(request("b", images=4)) == 99 * 2 / 8


def test_nor_does_one_who_joins_with_those_ahead_of_it() -> None:
    policy = batcher(*(request(name) for name in "abc"), seconds=lambda _kind, _rows: 1.0)
    assert policy.wait_of(request("d")) == 0
    policy.submit(request("d"))
    assert policy.wait_of(request("e")) == 4 * 3 * 2 / 8


def test_another_size_waits_for_what_runs() -> None:
    policy = batcher(request("a", images=4, steps=10), seconds=lambda _kind, _rows: 1.0)
    step(policy)
    assert policy.wait_of(request("b", size=LARGE)) == 0, "sizes take turns"
    policy.submit(request("c", images=4, size=LARGE))
    assert policy.wait_of(request("b", size=LARGE)) == 0, "a shorter one goes before it"
    assert policy.wait_of(request("b", images=4, size=LARGE)) == 9 + 3


def test_a_caller_does_not_wait_for_all_of_another() -> None:
    policy = batcher(*(request(str(index), caller="greedy") for index in range(50)), seconds=lambda _kind, _rows: 1.0)
    step(policy)
    assert policy.wait_of(request("a", caller="other")) < policy.wait_of(request("b", caller="greedy")) / 5


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_delay_that_it_has_once_it_is_queued(seed: int) -> None:
    dice = random.Random(seed)

    def anyone(name: str, *, images: int) -> Request:
        return request(
            name,
            images=images,
            steps=dice.randint(1, 30),
            caller=dice.choice("abc"),
            priority=dice.choice(("interactive", "batch")),
        )

    policy = batcher(
        *(anyone(str(index), images=dice.randint(1, 4)) for index in range(30)),
        seconds=lambda _kind, rows: 0.1 + rows / 8,
    )
    for _ in range(dice.randint(1, 20)):
        step(policy)
    newcomer = anyone("newcomer", images=4)  # rows that are never free
    before, expected = policy.waiting, policy.wait_of(newcomer)
    assert policy.waiting == before, "asking changes nothing"
    policy.submit(newcomer)
    assert expected == pytest.approx(policy.delay(newcomer))
    assert expected > 0
