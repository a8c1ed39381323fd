"""Fewer operations for each request under load: the dial `cache` is raised where requests leave it to the server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from server.requests.depths import Cache
from server.requests.schemas import GenerateRequest

_DIAL: tuple[Cache, ...] = get_args(Cache)
_PARTS = frozenset({"full_steps", "guidance_end"})  # fields that set a part of the dial


@dataclass(frozen=True, slots=True)
class Degradation:
    """Raises the dial by one position for requests that would wait long, and by two for those that would twice as long.

    One number decides, the estimate at acceptance, so equal requests in equal queues have equal positions.
    """

    at: float  # seconds

    def position(self, cache: Cache, *, wait: float) -> Cache:
        """The position of a request that would have `cache` without load, and is expected to wait `wait` seconds."""
        raised = sum(wait > times * self.at for times in (1, 2))
        return _DIAL[min(_DIAL.index(cache) + raised, len(_DIAL) - 1)]


def leaves_cache(body: GenerateRequest) -> bool:
    """Whether `body` leaves `cache` to the server: it sets neither that nor a part of it, nor asks for exact bytes."""
    given = {name for name in body.model_fields_set if getattr(body, name) is not None}
    return not body.exact and given.isdisjoint({"cache", *_PARTS})
