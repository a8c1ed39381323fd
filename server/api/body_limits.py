"""What the bodies of all callers may take together: memory until they are decoded, and threads that parse them."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from server.requests.errors import TooManyBodies

SMALL = 64 * 1024  # bytes: smaller bodies are not counted, and are parsed on the event loop
_MEMORY = 512 * 1024 * 1024  # bytes
_PARSERS = 1  # bodies that are parsed at once: each holds the interpreter's lock for up to 50 ms at a time


class BodyLimits:
    """The memory that bodies may take, and how many are parsed at once. For the event loop alone."""

    def __init__(self, memory: int = _MEMORY) -> None:
        self.parsers = asyncio.Semaphore(_PARSERS)
        self._memory = memory
        self._leased = 0

    def lease(self) -> Lease:
        """The share of one body; a context manager."""
        return Lease(self)

    def check(self, size: int) -> None:
        """Raise TooManyBodies where there is no memory for `size` more bytes."""
        if self._leased + size > self._memory:
            raise TooManyBodies(
                f"Other requests' bodies take the {self._memory >> 20} MiB that this server has for them: "
                "try again soon, or send smaller files.",
                retry_after=1,
            )

    def take(self, size: int) -> None:
        """Count `size` more bytes. Raises TooManyBodies."""
        self.check(size)
        self._leased += size

    def give_back(self, size: int) -> None:
        self._leased -= size


class Lease:
    """What one body takes of the limits, until its context ends."""

    def __init__(self, limits: BodyLimits) -> None:
        self.limits = limits
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _traceback: TracebackType | None) -> None:
        if self._size:
            self.limits.give_back(self._size)
            self._size = 0

    def expect(self, size: int) -> None:
        """A body of `size` bytes is announced. Raises TooManyBodies where there is no memory for it now.

        None is kept for it: callers who announce much and send little would keep it from others.
        """
        if size > SMALL:
            self.limits.check(size)

    def grow_to(self, size: int) -> None:
        """Take as much as has arrived, `size` bytes in all. Raises TooManyBodies."""
        if size > max(self._size, SMALL):
            self.limits.take(size - self._size)
            self._size = size
