"""More requests than the server can serve: those it accepts end well, the others hear it at once, and nothing stays."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Coroutine
from typing import Any

from benchmarks.faults.callers import EVENTS, Answer, Caller, Tally, ask_greedily, ask_patiently
from tests.faults.watching import SHORT, Watched, watched

_QUEUE = 8  # requests that may wait
_BURST = 10 * 2 * _QUEUE  # ten times what the queue and the batch hold together
WORK = {**SHORT, "num_inference_steps": 4}


async def burst(one: Watched, count: int) -> list[Answer]:
    """Send `count` requests at once."""
    caller = Caller(one.url, one.tally)
    return await asyncio.gather(*(caller.ask({**WORK, "seed": seed}) for seed in range(count)))


def test_a_burst_of_ten_times_the_capacity() -> None:
    with watched("--max-waiting", str(_QUEUE)) as one:
        for _ in range(2):
            asyncio.run(burst(one, _BURST))
        endings = one.tally.endings
        assert endings["completed"] + endings["refused"] == 2 * _BURST
        assert endings["completed"] >= 2 * _QUEUE
        assert endings["refused"] > endings["completed"], "the queue was not full: this proves nothing"
        refusals = [answer for answer in one.tally.answers if answer.ending == "refused"]
        assert all(answer.retry_after and 1 <= answer.retry_after <= 120 for answer in refusals)


async def arrivals(one: Watched, *, rate: float, seconds: float) -> None:
    """Requests at a constant rate, whoever is served; half of them as event streams."""
    caller = Caller(one.url, one.tally)
    async with asyncio.TaskGroup() as group:
        for number in range(int(rate * seconds)):
            accept = EVENTS if number % 2 else "application/json"
            group.create_task(caller.ask({**WORK, "seed": number}, accept=accept))
            await asyncio.sleep(1 / rate)


async def completed_per_second(one: Watched, *, users: int, seconds: float) -> float:
    """What the server completes when `users` always wait for a picture."""
    tally, over = Tally(), asyncio.Event()
    caller = Caller(one.url, tally)
    async with asyncio.TaskGroup() as group:
        for _ in range(users):
            group.create_task(ask_greedily(caller, WORK, until=over, pause=0))
        await asyncio.sleep(seconds)
        over.set()
    one.tally.sent += tally.sent
    one.tally.answers += tally.answers
    return tally.endings["completed"] / seconds


def test_twice_the_capacity_for_long() -> None:
    with watched("--max-waiting", str(_QUEUE)) as one:
        capacity = asyncio.run(completed_per_second(one, users=_QUEUE, seconds=5))
        served = one.tally.endings["completed"]
        asyncio.run(arrivals(one, rate=2 * capacity, seconds=15))
        endings = one.tally.endings
        assert endings["completed"] + endings["refused"] == one.tally.sent
        assert endings["refused"], "the server kept up: this proves nothing"
        assert endings["completed"] - served >= 15 * capacity / 3, "it refused those whom it could have served"


async def storm(one: Watched, *, callers: int, seconds: float) -> None:
    over = asyncio.Event()
    caller = Caller(one.url, one.tally)
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(ask_greedily(caller, WORK, until=over, pause=0.05))
        await asyncio.sleep(seconds)
        over.set()


def test_a_storm_of_retries() -> None:
    """Refused callers ask again at once."""
    with watched("--max-waiting", str(_QUEUE)) as one:
        asyncio.run(storm(one, callers=60, seconds=10))
        endings = one.tally.endings
        assert endings["completed"] + endings["refused"] == one.tally.sent
        assert endings["refused"] > endings["completed"] > _QUEUE


async def greedy_beside_polite(one: Watched) -> list[Answer]:
    """Two hundred connections of one address, and another that asks for five pictures one after the other."""
    over, polite_answers = asyncio.Event(), []
    greedy, polite = Caller(one.url, one.tally), Caller(one.url, one.tally, source="127.0.0.2")
    async with asyncio.TaskGroup() as group:
        for _ in range(200):
            group.create_task(ask_greedily(greedy, WORK, until=over, pause=0.2))
        await asyncio.sleep(2)
        for _ in range(5):
            polite_answers.append(await within(ask_patiently(polite, WORK, tries=20), seconds=60))
        over.set()
    return polite_answers


async def within(asking: Coroutine[Any, Any, Answer], *, seconds: float) -> Answer:
    try:
        return await asyncio.wait_for(asking, seconds)
    except TimeoutError:
        return Answer("left", seconds)


def test_a_greedy_caller_does_not_keep_a_polite_one_from_its_share() -> None:
    with watched("--max-waiting", "16") as one:
        answers = asyncio.run(greedy_beside_polite(one))
        assert [answer.ending for answer in answers] == ["completed"] * 5
        greedy = statistics.median(one.tally.seconds("completed"))
        polite = statistics.median(answer.seconds for answer in answers)
        assert polite < 2 * greedy + 1, "its share is half of the server, and so is that of 200 connections"
        assert one.tally.endings["refused"] > 200, "the greedy one was not greedy: this proves nothing"
