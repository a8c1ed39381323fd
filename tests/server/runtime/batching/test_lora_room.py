"""Requests join while the pool has room for their LoRAs; who waits for it is served before those who come later."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from server.requests.errors import InvalidRequest
from server.requests.request import Request
from server.runtime.batching.batcher import Batcher
from tests.support.batching import LARGE, SMALL, batcher, request, step


def steps(policy: Batcher) -> Iterator[str]:
    """The names of those who take each step, until none is left."""
    while policy.running or policy.waiting:
        batch = step(policy)
        assert batch
        assert batch.requests, "nobody takes a step, and somebody waits"
        yield " ".join(sorted(one.id for one in batch.requests))


def test_a_request_waits_until_the_pool_holds_its_loras_too() -> None:
    one, other = (request(name, loras={name: 5}, steps=2) for name in "ab")
    assert list(steps(batcher(one, other, lora_ranks=8))) == ["a", "a", "b", "b"]
    one, other = (request(name, loras={name: 4}, steps=2) for name in "ab")
    assert list(steps(batcher(one, other, lora_ranks=8))) == ["a b", "a b"]


def test_a_lora_of_several_requests_is_there_once() -> None:
    crowd = [request(name, loras={"x": 5}, steps=2, guided=False) for name in "abcd"]
    assert list(steps(batcher(*crowd, lora_ranks=8))) == ["a b c d"] * 2


def test_those_behind_wait_as_for_rows() -> None:
    crowd = [request("a", loras={"x": 5}, steps=2), request("b", loras={"y": 5}, steps=2), request("c", steps=2)]
    assert list(steps(batcher(*crowd, lora_ranks=8))) == ["a", "a", "b c", "b c"]


def test_sizes_of_a_model_share_the_pool_and_a_size_that_waits_for_it_takes_no_step() -> None:
    crowd = [request("a", loras={"x": 5}, steps=3), request("b", loras={"y": 5}, steps=1, size=LARGE)]
    assert list(steps(batcher(*crowd, lora_ranks=8))) == ["a", "a", "a", "b"]


def test_what_another_size_uses_becomes_less_while_a_request_waits_for_it() -> None:
    """A stream of newcomers of one size does not keep those of another from the pool."""
    policy = batcher(request("a", loras={"a": 4}, steps=4), lora_ranks=8)
    step(policy)
    policy.submit(request("large", loras={"b": 8}, steps=1, size=LARGE))
    taken = []
    for number in range(12):
        policy.submit(request(f"s{number}", loras={f"s{number}": 4}, steps=4, guided=False))
        batch = step(policy)
        assert batch
        taken.append(" ".join(one.id for one in batch.requests))
    assert "large" in taken[:8], taken


def test_without_loras_nothing_waits_for_the_pool() -> None:
    crowd = [request("a", loras={"x": 8}, steps=2), request("b", steps=2), request("c", steps=2, size=LARGE)]
    assert sorted(steps(batcher(*crowd, lora_ranks=8))) == ["a b", "a b", "c", "c"]


def test_the_turn_passes_on_when_the_request_that_waited_is_cancelled() -> None:
    waits = request("large", loras={"b": 8}, steps=1, size=LARGE)
    policy = batcher(request("a", loras={"a": 4}, steps=6), lora_ranks=8)
    step(policy)
    policy.submit(waits)
    step(policy)
    policy.submit(request("b", loras={"c": 4}, steps=2))
    waits.cancel()
    assert list(steps(policy)) == ["a b", "a b", "a", "a"]


def test_a_request_that_can_never_fit_is_refused() -> None:
    policy = batcher(lora_ranks=8)
    with pytest.raises(InvalidRequest, match="ask for fewer LoRAs"):
        policy.submit(request("a", loras={"x": 5, "y": 4}))


@pytest.mark.parametrize("seed", range(20))
def test_everyone_is_served_and_the_pool_is_never_too_full(seed: int) -> None:
    dice = random.Random(seed)

    def newcomer(number: int) -> Request:
        loras = {dice.choice("abcdefgh"): dice.randint(1, 4) for _ in range(dice.randint(0, 2))}
        ranks = {lora: ord(lora) % 4 + 1 for lora in loras}
        size = dice.choice((SMALL, LARGE))
        return request(str(number), loras=ranks, size=size, steps=dice.randint(1, 6), guided=dice.random() < 0.5)

    policy, waiting, done = batcher(lora_ranks=8), [newcomer(number) for number in range(60)], list[Request]()
    everyone = list(waiting)
    while waiting or policy.running or policy.waiting:
        for _ in range(min(dice.randint(0, 3), len(waiting))):
            policy.submit(waiting.pop())
        if not (policy.running or policy.waiting):
            continue
        batch = step(policy)
        assert batch
        assert batch.requests
        done += [one for one in batch.requests if one.denoised]
        running = [one for one in everyone if one in policy._models[""].running]
        held = {weighted.lora.name: weighted.lora.ranks for one in running for weighted in one.params.loras}
        assert sum(held.values()) <= 8
    assert len(done) == len(everyone)
