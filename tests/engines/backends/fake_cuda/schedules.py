"""When the work of streams is done, within what their order and their events allow."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Protocol
from weakref import WeakKeyDictionary

from tests.engines.backends.fake_cuda.streams import FakeStream, Piece, wait

_MOST_AT_A_LOOK = 3  # pieces of work that are done between two looks of the host


class Schedule(Protocol):
    """Does the pieces of work that streams queue."""

    def opened(self, stream: FakeStream) -> None: ...

    def given(self, stream: FakeStream, piece: Piece) -> None: ...

    def until(self, passed: threading.Event) -> None:
        """The host waits."""

    def look(self) -> None:
        """The host asks whether something is done, without waiting."""

    def changed(self) -> None:
        """What a stream waited for has come, and not from a stream."""


class Threads:
    """As soon as possible, in a thread of each stream. It ends when its stream is destroyed or its GPU is garbage."""

    def __init__(self) -> None:
        self._queues: WeakKeyDictionary[FakeStream, SimpleQueue[Piece]] = WeakKeyDictionary()

    def opened(self, stream: FakeStream) -> None:
        queue = self._queues[stream] = SimpleQueue()
        threading.Thread(target=_work, args=(queue,), name=f"stream {stream.handle:#x}", daemon=True).start()

    def given(self, stream: FakeStream, piece: Piece) -> None:
        self._queues[stream].put(piece)

    def until(self, passed: threading.Event) -> None:
        wait(passed)

    def look(self) -> None:
        """The threads go on by themselves."""

    def changed(self) -> None:
        """The threads wait by themselves."""


def _work(queue: SimpleQueue[Piece]) -> None:
    while True:
        piece = queue.get()
        if piece.awaited:
            wait(piece.awaited)
        piece.do()
        if piece.last:
            return
        del piece  # work knows the GPU, which would live as long as this waits for more


class Late:
    """As late as possible: only while the host waits, and a little whenever it looks. Subclasses choose the stream."""

    def __init__(self) -> None:
        self._queues: dict[FakeStream, list[Piece]] = {}
        self._changed = threading.Condition(threading.RLock())

    def opened(self, stream: FakeStream) -> None:
        with self._changed:
            self._queues[stream] = []

    def given(self, stream: FakeStream, piece: Piece) -> None:
        with self._changed:
            self._queues[stream].append(piece)
            self._changed.notify_all()

    def until(self, passed: threading.Event) -> None:
        with self._changed:
            while not passed.is_set():
                if not self._do_one() and not self._changed.wait(timeout=300):
                    raise TimeoutError("a stream was held for minutes")

    def look(self) -> None:
        with self._changed:
            for _ in range(self.pieces()):
                self._do_one()

    def changed(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def pieces(self) -> int:
        """How many pieces are done when the host looks."""
        raise NotImplementedError

    def choose(self, ready: Sequence[FakeStream]) -> FakeStream:
        """The stream whose next piece of work is done."""
        raise NotImplementedError

    def _do_one(self) -> bool:
        """Returns whether there was something to do."""
        ready = [stream for stream, queue in self._queues.items() if queue and queue[0].ready]
        if not ready:
            return False
        stream = self.choose(ready)
        piece = self._queues[stream].pop(0)
        piece.do()
        self._changed.notify_all()
        if piece.last:
            del self._queues[stream]
        return True


class Seeded(Late):
    """Any order that the events allow, chosen by a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def pieces(self) -> int:
        return self._random.randint(0, _MOST_AT_A_LOOK)

    def choose(self, ready: Sequence[FakeStream]) -> FakeStream:
        return self._random.choice(ready)


class ByPriority(Late):
    """What is pending on the streams of the greatest priority comes first, as on a GPU that is full."""

    def pieces(self) -> int:
        return 1

    def choose(self, ready: Sequence[FakeStream]) -> FakeStream:
        return min(ready, key=lambda stream: stream.priority)  # the lower number is the greater priority
