"""Rows of a buffer: shared while used, given to others after the last step that reads them."""

from __future__ import annotations

import pytest

from engines.backends.device import Event
from engines.backends.host import HostEvent, HostStream
from engines.errors import EngineError
from server.runtime.pipeline.row_cache import RowCache


class Followed(HostStream):
    """Notes which events it waits for."""

    def __init__(self) -> None:
        super().__init__(urgent=False)
        self.events: list[Event] = []
        self.broken = False

    def follow(self, event: Event) -> None:
        if self.broken:
            raise EngineError("broken")
        self.events.append(event)


def test_rows_of_a_key_need_not_be_adjacent() -> None:
    cache = RowCache[str](range(4))
    rows = [cache.add(key, 1)[0] for key in "abcd"]
    cache.release("a")
    cache.release("c")
    assert set(cache.add("e", 2)) == {rows[0], rows[2]}
    assert cache["b"] == (rows[1],)


def test_no_more_are_evicted_than_necessary_and_the_rest_of_their_rows_is_free() -> None:
    cache = RowCache[str](range(8))
    for key, count in (("a", 5), ("b", 3)):
        cache.add(key, count)
        cache.release(key)
    cache.add("c", 2)
    assert ("a" in cache, "b" in cache) == (False, True)
    cache.add("d", 3)
    assert "b" in cache
    assert cache.used == 5


def test_who_has_used_a_key_last_keeps_it_the_longest() -> None:
    cache = RowCache[str](range(2))
    for key in "ab":
        cache.add(key, 1)
        cache.release(key)
    cache.hold("a")
    cache.release("a")
    cache.add("c", 1)
    assert ("a" in cache, "b" in cache) == (True, False)


def test_a_key_is_in_use_until_everyone_has_released_it() -> None:
    cache = RowCache[str](range(1))
    cache.add("a", 1)
    cache.hold("a")
    cache.release("a")
    assert cache.is_used("a")
    with pytest.raises(StopIteration):
        cache.add("b", 1)
    cache.release("a")
    assert cache.add("b", 1) == (0,)


def test_a_row_remembers_its_last_reader_although_its_key_is_gone() -> None:
    """The rest of what is evicted is free, and may still be read."""
    cache, stream, read = RowCache[str](range(4)), Followed(), HostEvent()
    cache.add("a", 4)
    cache.release("a", read)
    first = cache.add("b", 1)
    cache.await_readers(first, stream)
    assert stream.events == [read]
    cache.await_readers(first, stream)
    assert stream.events == [read], "it is written already"
    rest = cache.add("c", 3)
    cache.await_readers(rest, stream)
    assert stream.events == [read, read], "once for three rows"


def test_a_key_that_was_not_written_frees_its_rows_and_keeps_their_readers() -> None:
    cache, stream, read = RowCache[str](range(1)), Followed(), HostEvent()
    cache.add("a", 1)
    cache.release("a", read)
    stream.broken = True
    with pytest.raises(EngineError):
        cache.await_readers(cache.add("b", 1), stream)
    cache.discard("b")
    stream.broken = False
    cache.await_readers(cache.add("c", 1), stream)
    assert stream.events == [read]
    assert cache.used == 1
