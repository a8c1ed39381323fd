"""Clients that are silent, slow or hostile take nothing from others: /live answers, polite callers are served."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.faults.attackers import ATTACKS, Damage, Target
from benchmarks.faults.callers import Caller
from tests.faults.watching import SHORT, Watched, watched

_MEMORY = 256 * 2**20  # bytes that may stay after gigabytes were sent; 3.6 GB did once


async def attacked(one: Watched, name: str) -> Damage:
    """Attack, and meanwhile ask for a picture now and then as others do."""
    damage, over = Damage(), asyncio.Event()

    async def others() -> None:
        caller = Caller(one.url, one.tally, source="127.0.0.3")
        while not over.is_set():
            await caller.ask(SHORT)
            await asyncio.sleep(0.5)

    async with asyncio.TaskGroup() as group:
        group.create_task(others())
        await ATTACKS[name](Target(one.url), damage)
        over.set()
    return damage


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("header_flood", {"431", "400", "closed"}),
        ("invalid_base64", {"400", "413", "422", "429", "503"}),
        ("endless_body", {"413", "closed"}),
        ("silent_connections", {"408", "closed"}),
        ("slowloris", {"408", "closed"}),
        ("malformed_flood", {"400", "404", "422"}),
    ],
)
def test_attacks_are_refused_while_others_are_served(name: str, answers: set[str]) -> None:
    with watched(memory=_MEMORY) as one:
        damage = asyncio.run(attacked(one, name))
        assert damage.answers
        assert damage.answers.keys() <= answers
        assert set(one.tally.endings) == {"completed"}
        assert one.tally.sent


def test_many_large_bodies_are_bounded_in_memory() -> None:
    """Those beyond the budget are told to come again: the others' outcomes are in the ledger."""
    with watched(memory=_MEMORY) as one:
        before = one.serving.total("latentd_requests_total", api="generate", outcome="completed")
        damage = asyncio.run(attacked(one, "large_bodies"))
        assert damage.answers.total() == 120
        assert damage.answers.keys() <= {"200", "413", "422", "429", "503"}
        after = one.serving.total("latentd_requests_total", api="generate", outcome="completed")
        one.count("completed", int(after - before) - one.tally.endings["completed"])


def test_slow_readers_do_not_hold_up_others() -> None:
    with watched(memory=_MEMORY) as one:
        damage = asyncio.run(attacked(one, "slow_readers"))
        assert damage.answers == {"200": 20}
        assert set(one.tally.endings) == {"completed"}
        one.count("left", 20)
