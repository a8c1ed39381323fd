"""What somebody who follows a request hears."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from server.api.event_queue import EventQueue
from server.requests.request import Event, Request, Started, Stepped
from server.requests.schemas import QueuedEvent
from server.runtime.batching.batcher import Batcher

KEEPALIVE_SECONDS = 15.0
_POLL_SECONDS = 1.0  # between looks at the position in the queue

Update = Event | QueuedEvent | None


async def updates(
    queue: EventQueue, first: QueuedEvent | Started | Stepped, position: Callable[[], QueuedEvent | None]
) -> AsyncIterator[Update]:
    """What `first` says, then the events, the position whenever that has changed, and None after a long silence."""
    yield first
    last = first.position if isinstance(first, QueuedEvent) else None
    silent = 0.0
    async for event in queue.events(keepalive=_POLL_SECONDS):
        update: Update = event
        if update is None:
            silent += _POLL_SECONDS
            now = position()
            if now is not None and now.position != last:
                update, last = now, now.position
            elif silent < KEEPALIVE_SECONDS:
                continue
        silent = 0.0
        yield update


def queued_event(batcher: Batcher, request: Request, *, name: str, position: int) -> QueuedEvent:
    seconds = batcher.delay(request)
    return QueuedEvent(id=name, position=position, estimate_s=round(seconds, 1) if seconds else None)


def queued_now(batcher: Batcher, request: Request, *, name: str) -> QueuedEvent | None:
    """The position of a request that waits."""
    position = batcher.position(request)
    return None if position is None else queued_event(batcher, request, name=name, position=position)
