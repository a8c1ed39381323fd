"""What every backend offers: a device with memory, streams of work on it, and engines whose buffers are bound once and
run many times.

A bound `Call` is the unit of work: on a CPU it is one run of a session, on a GPU it is what a CUDA graph captures.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from numpy.typing import DTypeLike

from engines.contract import Array


class Buffer(Protocol):
    """Memory on the device, of one shape and dtype as long as it lives. Streams write, copy and read it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def view(self, shape: tuple[int, ...], dtype: DTypeLike, *, offset: int) -> Buffer:
        """A part of this memory, from byte `offset` on, under a shape and dtype of its own; it keeps the whole alive.

        Offsets are multiples of `ALIGNMENT`. Raises ValueError for a part that is not inside.
        """


class Event(Protocol):
    """A mark in a stream's work."""

    def done(self) -> bool:
        """Whether the stream has passed it. Raises DeviceLost."""

    def wait(self) -> None:
        """Return when the stream has passed it. Raises DeviceLost."""

    def seconds_since(self, earlier: Event) -> float:
        """Time on the device between two timed events that were passed."""


class Reading(Protocol):
    """Values on their way to the host."""

    def done(self) -> bool:
        """Whether they have arrived. Raises DeviceLost."""

    def result(self) -> Array:
        """The values, which are the caller's own, once they have arrived. Raises DeviceLost."""


class Stream(Protocol):
    """Work that the device does in the order it was given. The host goes on meanwhile, and so do other streams.

    A device without streams does each piece when it is given; its events are passed when they are recorded.
    """

    def write(self, buffer: Buffer, values: Array, *, at: int | None = None) -> None:
        """Copy `values` into `buffer`, or into its entry `at` along the first axis. They may be changed on return."""

    def copy(self, source: Buffer, to: Buffer, *, source_at: int | None = None, at: int | None = None) -> None:
        """Copy `source`, or its entry `source_at`, into `to`, or into its entry `at`, without leaving the device."""

    def read(self, buffer: Buffer, *, at: int | None = None) -> Reading:
        """Copy `buffer`, or its entry `at` along the first axis, to the host."""

    def record(self, *, timed: bool = False) -> Event:
        """Mark what was given so far."""

    def follow(self, event: Event) -> None:
        """Do what is given from now on only when the stream of `event` has passed it. The host does not wait."""


class Call(Protocol):
    """An engine with every input and output bound."""

    def launch(self) -> None:
        """Give the computation of the outputs to the engine's stream.

        Raises:
            EngineError: it was not given, and nothing has changed. DeviceLost.
        """


class Engine(Protocol):
    """One compiled graph behind one backend, on the stream it was loaded for."""

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        """Fix the memory of every input and output by name. Raises EngineError for a name that does not fit."""


class Device(Protocol):
    """Where engines run. One thread owns it: the one that opened it."""

    name: str
    pads: bool  # steps are filled up to the row buckets that its engines were compiled or captured for

    def stream(self, name: str, *, urgent: bool = False) -> Stream:
        """A stream of its own. Where work of several could go on, that of urgent ones does."""

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike, *, purpose: str = "other") -> Buffer:
        """Return zeroed memory on the device. Raises EngineError where it is full: what takes how much, what to do."""

    def load(self, path: Path, stream: Stream) -> Engine:
        """Load the graph at `path`, which the caller has checked by hash, for work on `stream`. Raises EngineError."""

    def end_warm_up(self) -> None:
        """Warming up is over: keep what was learned of it for the next start."""

    def memory(self) -> Mapping[str, int]:
        """Bytes of its memory in use here, by purpose."""


ALIGNMENT = 256  # bytes, of a view's offset: what TensorRT asks of an address
