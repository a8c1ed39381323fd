"""The events of a request, from the executor's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from server.requests.request import Event, Outcome, Request


class EventQueue:
    """Carries a request's events into the event loop that created it; without `follows`, only the outcome."""

    def __init__(self, *, follows: bool) -> None:
        self._follows = follows
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def on_event(self, _request: Request, event: Event) -> None:
        """A listener for `Request`; callable from any thread."""
        if not self._follows and not isinstance(event, Outcome):
            return  # each one would wake the loop
        with suppress(RuntimeError):  # the loop is closed, and the caller gone
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self, *, keepalive: float) -> AsyncIterator[Event | None]:
        """Yield each event up to the outcome; None after every `keepalive` seconds without one."""
        while True:
            try:
                event = await asyncio.wait_for(self._events.get(), keepalive)
            except TimeoutError:
                yield None
                continue
            yield event
            if isinstance(event, Outcome):
                return

    async def outcome(self) -> Outcome:
        """Wait for the outcome."""
        while True:
            event = await self._events.get()
            if isinstance(event, Outcome):
                return event
