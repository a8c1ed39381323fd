"""What a caller hears of its request."""

from __future__ import annotations

import asyncio

import pytest

from engines.manifest import NoiseSchedule, Size
from engines.schedulers import Scheduler, table
from server.api.event_queue import BACKLOG, EventQueue
from server.requests.errors import Cancelled
from server.requests.params import GenerationParams
from server.requests.request import Event, Failed, Request, Started, Stepped
from server.requests.tokenizer import Prompt

EVENTS: tuple[Event, ...] = (Started(), Stepped(1, 2), Stepped(2, 2), Failed(Cancelled("Somebody else was drawn.")))


def make_request(event_queue: EventQueue) -> Request:
    nothing, scheduler = Prompt("", ()), Scheduler("ddim")
    params = GenerationParams(nothing, nothing, Size(width=64, height=64), scheduler, 2, 7.5, (1,))
    return Request(params, table(scheduler, 2, NoiseSchedule()), (event_queue.on_event,), "a")


async def tell_all(event_queue: EventQueue) -> None:
    """From another thread, as the executor does."""
    request = make_request(event_queue)
    for event in EVENTS:
        await asyncio.to_thread(request.notify, event)


def test_who_follows_hears_everything_in_order() -> None:
    async def follow() -> list[Event | None]:
        event_queue = EventQueue(follows=True)
        await tell_all(event_queue)
        return [event async for event in event_queue.events(keepalive=60)]

    assert tuple(asyncio.run(follow())) == EVENTS


@pytest.mark.parametrize("follows", [False, True])
def test_everyone_hears_the_ending(follows: bool) -> None:
    async def wait() -> Event:
        event_queue = EventQueue(follows=follows)
        await tell_all(event_queue)
        return await event_queue.outcome()

    assert asyncio.run(wait()) == EVENTS[-1]


def test_who_waits_for_the_ending_alone_is_woken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait() -> int:
        calls: list[object] = []
        monkeypatch.setattr(asyncio.get_running_loop(), "call_soon_threadsafe", lambda *call: calls.append(call))
        request = make_request(EventQueue(follows=False))
        for event in EVENTS:
            request.notify(event)
        monkeypatch.undo()
        return len(calls)

    assert asyncio.run(wait()) == 1


def test_who_reads_slowly_misses_steps_and_nothing_else() -> None:
    async def follow() -> list[Event | None]:
        event_queue = EventQueue(follows=True)
        request = make_request(event_queue)
        for event in (Started(), *(Stepped(step, 200) for step in range(1, 201)), EVENTS[-1]):
            request.notify(event)
        return [event async for event in event_queue.events(keepalive=60)]

    started, *steps, ending = asyncio.run(follow())
    assert (started, ending) == (Started(), EVENTS[-1])
    assert steps == [Stepped(step, 200) for step in range(201 - BACKLOG, 201)]
