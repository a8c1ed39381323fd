"""What a caller hears of its request."""

from __future__ import annotations

import asyncio

import pytest

from engines.manifest import NoiseSchedule, Size
from server.api.ticket import Ticket
from server.errors import Cancelled
from server.request import Event, Failed, Request, Started, Stepped, Wish
from server.schedulers import Scheduler, table
from server.tokenizer import Prompt

EVENTS: tuple[Event, ...] = (Started(), Stepped(1, 2), Stepped(2, 2), Failed(Cancelled("Somebody else was drawn.")))


def make_request(ticket: Ticket) -> Request:
    nothing, scheduler = Prompt("", ()), Scheduler("ddim")
    wish = Wish(nothing, nothing, Size(width=64, height=64), scheduler, 2, 7.5, (1,))
    return Request(wish, table(scheduler, 2, NoiseSchedule()), (ticket.hear,), "a")


async def tell_all(ticket: Ticket) -> None:
    """From another thread, as the executor does."""
    request = make_request(ticket)
    for event in EVENTS:
        await asyncio.to_thread(request.tell, event)


def test_who_follows_hears_everything_in_order() -> None:
    async def follow() -> list[Event | None]:
        ticket = Ticket(follows=True)
        await tell_all(ticket)
        return [event async for event in ticket.events(keepalive=60)]

    assert tuple(asyncio.run(follow())) == EVENTS


@pytest.mark.parametrize("follows", [False, True])
def test_everyone_hears_the_ending(follows: bool) -> None:
    async def wait() -> Event:
        ticket = Ticket(follows=follows)
        await tell_all(ticket)
        return await ticket.ending()

    assert asyncio.run(wait()) == EVENTS[-1]


def test_who_waits_for_the_ending_alone_is_woken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait() -> int:
        calls: list[object] = []
        monkeypatch.setattr(asyncio.get_running_loop(), "call_soon_threadsafe", lambda *call: calls.append(call))
        request = make_request(Ticket(follows=False))
        for event in EVENTS:
            request.tell(event)
        monkeypatch.undo()
        return len(calls)

    assert asyncio.run(wait()) == 1
