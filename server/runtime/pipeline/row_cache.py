"""A cache in the rows of a buffer on the device, which steps read while others are written."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from engines.backends.device import Event, Stream

Key = TypeVar("Key", bound=Hashable)


class RowCache(Generic[Key]):
    """Which rows of a buffer hold the values of which key. Those of a key need not be adjacent.

    Requests share the rows of a key, and rows outlive their requests until the space is needed. The least recently
    used key that no request uses makes room.
    """

    def __init__(self, rows: Iterable[int]) -> None:
        self._free = list(rows)
        self._rows: OrderedDict[Key, tuple[int, ...]] = OrderedDict()  # least recently used first
        self._users: Counter[Key] = Counter()
        self._last_read: dict[int, Event] = {}  # by steps, of rows that were released since they were written

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[Key]:
        return iter(self._rows)

    def __getitem__(self, key: Key) -> tuple[int, ...]:
        return self._rows[key]

    @property
    def used(self) -> int:
        """The rows of keys that requests use."""
        return sum([len(self._rows[key]) for key in self._users])

    def hold(self, key: Key) -> None:
        """Keep the rows of `key`, which is cached, until `release`."""
        self._rows.move_to_end(key)
        self._users[key] += 1

    def add(self, key: Key, count: int) -> tuple[int, ...]:
        """Give `key`, which is not cached, `count` rows, and keep them until `release` or `discard`.

        Requests must leave as many: batchers see to that. Call `await_readers` before a row is written.
        """
        while len(self._free) < count:
            self._evict()
        self._rows[key] = tuple([self._free.pop() for _ in range(count)])
        self._users[key] += 1
        return self._rows[key]

    def release(self, key: Key, last_read: Event | None = None) -> None:
        """Undo one `hold` or `add`. No step reads the rows for it after `last_read`; None: none has read them."""
        self._users[key] -= 1
        if last_read:
            self._last_read |= dict.fromkeys(self._rows[key], last_read)
        if not self._users[key]:
            del self._users[key]

    def discard(self, key: Key) -> None:
        """Free the rows of `key`, which were not written, although requests may use it."""
        self._users.pop(key, None)
        self._free.extend(self._rows.pop(key))

    def is_used(self, key: Key) -> bool:
        """Whether a request uses `key`."""
        return key in self._users

    def await_readers(self, rows: Sequence[int], stream: Stream) -> None:
        """Let `stream` wait for the last steps that read `rows`, which is mostly long ago; the host does not wait."""
        for event in dict.fromkeys([self._last_read[row] for row in rows if row in self._last_read]):
            stream.follow(event)
        for row in rows:
            self._last_read.pop(row, None)  # not before: a failed call would lose them

    def _evict(self) -> None:
        unused = next(key for key in self._rows if key not in self._users)
        self._free.extend(self._rows.pop(unused))
