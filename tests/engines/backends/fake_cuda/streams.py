"""Streams, and the pieces of work that are queued on them."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary, ref

from tests.engines.backends.fake_cuda.hazards import Clock, Stamp, merge

if TYPE_CHECKING:
    from tests.engines.backends.fake_cuda.gpu import Gpu

Work = Callable[[], None]

handles = itertools.count(0x1000, 0x10)  # of streams, events and graphs: no two fakes share one
_streams: WeakValueDictionary[int, FakeStream] = WeakValueDictionary()
_running = threading.local()


def stream_of(handle: int) -> FakeStream | None:
    """The stream behind a handle, as libraries find it."""
    return _streams.get(int(handle))


def running() -> Stamp | None:
    """The piece of work that this thread does now."""
    return getattr(_running, "stamp", None)


@dataclass(eq=False)
class Mark:
    """A point in a stream's work, with the time at which it was passed."""

    clock: Clock  # what comes before it
    passed: threading.Event = field(default_factory=threading.Event)
    time: float = 0.0

    def set(self) -> None:
        self.time = perf_counter()
        self.passed.set()


@dataclass(eq=False)
class Capture:
    """Work that is recorded in place of being done, in an order in which it could be."""

    origin: FakeStream
    mode: Any
    thread: int
    work: list[Work] = field(default_factory=list)
    given: Counter[FakeStream] = field(default_factory=Counter)  # pieces of work, by stream
    joined: Counter[FakeStream] = field(default_factory=Counter)  # of these, how many the origin waits for
    broken: bool = False


@dataclass(eq=False)
class Piece:
    """A piece of a stream's work."""

    work: Work
    stamp: Stamp
    cuda: ref[Gpu]
    always: bool = False  # also on a lost device
    awaited: threading.Event | None = None  # what has to come before it
    last: bool = False

    @property
    def ready(self) -> bool:
        return self.awaited is None or self.awaited.is_set()

    def do(self) -> None:
        cuda, _running.stamp = self.cuda(), self.stamp
        try:
            if self.always or (cuda and cuda.lost is None):
                self.work()
        except Exception as error:  # a kernel that fails
            if cuda:
                cuda.fault(f"{type(error).__name__} in a stream: {error}")
        finally:
            _running.stamp = None


class FakeStream:
    """A queue of work that is done in order."""

    def __init__(self, cuda: Gpu, priority: int) -> None:
        self.priority = priority
        self.handle = next(handles)
        self.capture: Capture | None = None
        self.clock: Clock = {}
        self._cuda = ref(cuda)
        self._schedule, self._hazards = cuda.schedule, cuda.hazards
        self._schedule.opened(self)
        _streams[self.handle] = self

    def give(self, work: Work) -> None:
        """Do `work` later, or record it where the stream captures."""
        if self.capture:
            self.capture.work.append(work)
            self.capture.given[self] += 1
        else:
            self._put(work)

    def mark(self) -> Mark:
        """The point after all work so far."""
        mark = Mark(dict(self.clock))
        self._put(mark.set, always=True)
        return mark

    def follow(self, mark: Mark) -> None:
        """Do nothing more before `mark` is passed."""
        merge(self.clock, mark.clock)
        self.hold(mark.passed)

    def hold(self, opened: threading.Event) -> None:
        """Do nothing more before `opened` is set."""
        self._put(_nothing, always=True, awaited=opened)

    def close(self) -> None:
        """Do what was given, and end."""
        self._put(_nothing, always=True, last=True)

    def _put(self, work: Work, **how: Any) -> None:
        merge(self.clock, self._hazards.host)
        self.clock[self.handle] = number = self.clock.get(self.handle, 0) + 1
        stamp = Stamp(self.handle, number, dict(self.clock))
        self._schedule.given(self, Piece(work, stamp, self._cuda, **how))


def _nothing() -> None:
    """A piece of work that only has a place in the order."""


def wait(opened: threading.Event) -> None:
    """Wait for at most minutes, so that a deadlock fails the test."""
    if not opened.wait(timeout=300):
        raise TimeoutError("a stream was held for minutes")
