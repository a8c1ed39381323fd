"""The host's own memory, for the backends that compute there: buffers, a stream that never waits, and their device."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Mapping
from time import perf_counter

import numpy as np
from numpy.typing import DTypeLike

from engines.backends.device import ALIGNMENT, Buffer, Event
from engines.contract import Array
from engines.errors import EngineError


class HostBuffer:
    """A numpy array under the `Buffer` protocol."""

    def __init__(self, array: Array) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def view(self, shape: tuple[int, ...], dtype: DTypeLike, *, offset: int) -> HostBuffer:
        """Part of the same memory. Raises ValueError for a part that is not inside, or that no device could address."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if offset % ALIGNMENT or not 0 <= offset <= self.array.nbytes - size:
            raise ValueError(f"{size} bytes at {offset} are no part of {self.array.nbytes}, in steps of {ALIGNMENT}.")
        part = self.array.reshape(-1).view(np.uint8)[offset : offset + size]
        return HostBuffer(part.view(dtype).reshape(shape))


class HostEvent:
    """A moment: what was given before is done."""

    def __init__(self) -> None:
        self._moment = perf_counter()

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        """There is nothing to wait for."""

    def seconds_since(self, earlier: Event) -> float:
        if not isinstance(earlier, HostEvent):
            raise EngineError(f"This backend's events are the host's, was given {type(earlier).__name__}.")
        return self._moment - earlier._moment


class HostReading:
    """A copy that was made at once."""

    def __init__(self, values: Array) -> None:
        self._values = values

    def done(self) -> bool:
        return True

    def result(self) -> Array:
        return self._values


class HostStream:
    """Does each piece of work when it is given."""

    def __init__(self, *, urgent: bool) -> None:
        self.urgent = urgent

    def write(self, buffer: Buffer, values: Array, *, at: int | None = None) -> None:
        np.copyto(_entry(buffer, at), values)

    def copy(self, source: Buffer, to: Buffer, *, source_at: int | None = None, at: int | None = None) -> None:
        """Raises EngineError for memory of another device, or of another type or size than where it goes."""
        given, entry = _entry(source, source_at), _entry(to, at)
        if (given.dtype, given.size) != (entry.dtype, entry.size):
            raise EngineError(
                f"A copy goes to {entry.dtype} {entry.shape}, was given {given.dtype} {given.shape}: "
                "both have one type and size."
            )
        np.copyto(entry, given.reshape(entry.shape))

    def read(self, buffer: Buffer, *, at: int | None = None) -> HostReading:
        return HostReading(_entry(buffer, at).copy())

    def record(self, *, timed: bool = False) -> HostEvent:  # noqa: ARG002 - the host's clock costs nothing
        return HostEvent()

    def follow(self, event: Event) -> None:
        """Nothing is left to wait for: the host's events are passed when they are recorded."""


class HostDevice:
    """This machine's memory. Who computes there adds a name and `load`."""

    pads = False

    def __init__(self) -> None:
        self._in_use: Counter[str] = Counter()  # bytes by purpose

    def stream(self, name: str, *, urgent: bool = False) -> HostStream:  # noqa: ARG002 - work is done as it comes
        return HostStream(urgent=urgent)

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike, *, purpose: str = "other") -> HostBuffer:
        try:
            array = np.zeros(shape, dtype)
        except MemoryError as error:
            raise EngineError(self._full(shape, dtype, purpose)) from error
        self._in_use[purpose] += array.nbytes
        # When the array is gone, and every view of it: numpy lets each view hold the array that owns the memory.
        weakref.finalize(array, self._in_use.subtract, {purpose: array.nbytes}).atexit = False
        return HostBuffer(array)

    def end_warm_up(self) -> None:
        """Nothing here is learned by warming up."""

    def memory(self) -> Mapping[str, int]:
        """Bytes of buffers; what an engine takes for itself is not known."""
        return dict(+self._in_use)

    def _full(self, shape: tuple[int, ...], dtype: DTypeLike, purpose: str) -> str:
        wanted = math.prod(shape) * np.dtype(dtype).itemsize
        taken = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in self.memory().items()) or "nothing"
        return (
            f"This machine's memory has no {wanted / 2**20:.0f} MiB for {purpose}, beside what is taken: {taken}. "
            "Build with fewer --rows or a smaller --resolution, or end what else runs here."
        )


def host_array(buffer: Buffer) -> Array:
    """The array behind `buffer`. Raises EngineError for memory of another device."""
    if not isinstance(buffer, HostBuffer):
        raise EngineError(f"This backend reads host memory, was given {type(buffer).__name__}.")
    return buffer.array


def bound_arrays(buffers: Mapping[str, Buffer], names: set[str]) -> dict[str, Array]:
    """The arrays behind `buffers`. Raises EngineError unless they are exactly those that the graph names."""
    if names != buffers.keys():
        raise EngineError(f"This graph takes {sorted(names)}, was given {sorted(buffers)}.")
    return {name: host_array(buffer) for name, buffer in buffers.items()}


def _entry(buffer: Buffer, at: int | None) -> Array:
    """A view of the whole of `buffer`, or of its entry `at`. Raises IndexError where there is none."""
    array = host_array(buffer)
    if at is None:
        return array
    entry: Array = array[at, ...]  # the dots keep an entry of one dimension an array
    return entry
