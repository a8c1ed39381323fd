"""Which uses of memory are ordered, by vector clocks (Fidge 1988, Mattern 1989): all streams and the host are actors.

A stream's work comes after what was given to it before, after the events that it follows, and after what the host had
waited for when it gave the work. Uses of the same bytes that are not ordered are a hazard, if one of them writes.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass

Clock = dict[int, int]  # by stream, how many of its pieces of work are known to come before


@dataclass(frozen=True, slots=True)
class Stamp:
    """A place in the order: the piece of work of that number on a stream, after all that `clock` counts."""

    stream: int
    number: int
    clock: Clock

    def ordered(self, other: Stamp) -> bool:
        """Whether one of the two comes after the other."""
        return self.before(other) or other.before(self)

    def before(self, other: Stamp) -> bool:
        return other.clock.get(self.stream, 0) >= self.number


@dataclass(frozen=True, slots=True)
class Use:
    stamp: Stamp
    start: int
    end: int
    writes: bool

    def conflicts(self, other: Use) -> bool:
        overlap = self.start < other.end and other.start < self.end
        return overlap and (self.writes or other.writes) and not self.stamp.ordered(other.stamp)

    def replaces(self, other: Use) -> bool:
        """Whether whatever conflicts with `other` from now on conflicts with this too."""
        covered = self.start <= other.start and other.end <= self.end
        return covered and (self.writes or not other.writes) and other.stamp.before(self.stamp)

    def __str__(self) -> str:
        verb = "writes" if self.writes else "reads"
        return f"stream {self.stamp.stream:#x} {verb} {self.end - self.start} bytes at {self.start:#x}"


class Hazards:
    """The uses of every block of memory."""

    def __init__(self) -> None:
        self.host: Clock = {}  # what the host has waited for
        self._uses: dict[int, list[Use]] = defaultdict(list)  # by the block's address
        self._lock = threading.Lock()

    def add(self, block: int, use: Use) -> str | None:
        """Note a use; returns what is wrong with it."""
        with self._lock:
            uses = self._uses[block]
            conflict = next((one for one in uses if use.conflicts(one)), None)
            uses[:] = [one for one in uses if not use.replaces(one)]
            uses.append(use)
        return f"{use}, and {conflict}: no event orders them" if conflict else None

    def freed(self, block: int) -> None:
        with self._lock:
            self._uses.pop(block, None)

    def host_waited(self, clock: Clock) -> None:
        with self._lock:
            merge(self.host, clock)


def merge(clock: Clock, other: Clock) -> None:
    """Come after all that `other` counts, too."""
    for stream, number in list(other.items()):
        clock[stream] = max(clock.get(stream, 0), number)
