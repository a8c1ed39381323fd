"""The events of a request, from the executor's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress

from server.requests.request import Event, Outcome, Request, Stepped

BACKLOG = 32  # steps that wait for a caller who reads slowly; then older ones are left out


class EventQueue:
    """Carries a request's events into the event loop that created it; without `follows`, only the outcome."""

    def __init__(self, *, follows: bool) -> None:
        self._follows = follows
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._steps = 0  # of them
        self._arrived = asyncio.Event()

    def on_event(self, _request: Request | None, event: Event) -> None:
        """A listener for `Request`; callable from any thread."""
        if not self._follows and not isinstance(event, Outcome):
            return  # each one would wake the loop
        with suppress(RuntimeError):  # the loop is closed, and the caller gone
            self._loop.call_soon_threadsafe(self._put, event)

    async def events(self, *, keepalive: float | None) -> AsyncIterator[Event | None]:
        """Yield each event up to the outcome; None after every `keepalive` seconds without one, if set."""
        while True:
            try:
                event = await asyncio.wait_for(self._get(), keepalive)
            except TimeoutError:
                yield None
                continue
            yield event
            if isinstance(event, Outcome):
                return

    async def outcome(self) -> Outcome:
        """Wait for the outcome."""
        while True:
            event = await self._get()
            if isinstance(event, Outcome):
                return event

    def _put(self, event: Event) -> None:
        if isinstance(event, Stepped):
            self._steps += 1
            if self._steps > BACKLOG:
                self._drop_oldest_step()
        self._events.append(event)
        self._arrived.set()

    def _drop_oldest_step(self) -> None:
        oldest = next(event for event in self._events if isinstance(event, Stepped))
        self._events.remove(oldest)
        self._steps -= 1

    async def _get(self) -> Event:
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        self._steps -= isinstance(event, Stepped)
        return event
