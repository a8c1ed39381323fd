"""Host memory and synchronous streams, for the backends that compute on the CPU."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Mapping
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from engines.backends.device import ALIGNMENT, Buffer, Event
from engines.contract import Array
from engines.errors import EngineError


class GraphPort(NamedTuple):
    """An input or output of a loaded graph, as the runtime that loaded it describes it."""

    dtype: str  # numpy's name; empty for one that numpy has not
    shape: tuple[int | None, ...]  # None where any size goes

    def takes(self, array: Array) -> bool:
        """Whether `array` may be bound to it."""
        sizes = zip(self.shape, array.shape, strict=False)
        fits = len(self.shape) == array.ndim and all(size in (None, given) for size, given in sizes)
        return fits and self.dtype == array.dtype.name

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join('?' if size is None else str(size) for size in self.shape)}]"


class HostBuffer:
    """A numpy array under the `Buffer` protocol."""

    def __init__(self, array: Array) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def view(self, shape: tuple[int, ...], dtype: DTypeLike, *, offset: int) -> HostBuffer:
        """A part of the same memory. Offsets are checked as on GPUs, so that a test on a CPU finds a bad one."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if offset % ALIGNMENT or not 0 <= offset <= self.array.nbytes - size:
            raise ValueError(
                f"A view of {size} bytes at offset {offset} does not fit into {self.array.nbytes} bytes "
                f"at a multiple of {ALIGNMENT}."
            )
        part = self.array.reshape(-1).view(np.uint8)[offset : offset + size]
        return HostBuffer(part.view(dtype).reshape(shape))


class HostEvent:
    """A point in time. All earlier work is done."""

    def __init__(self) -> None:
        self._moment = perf_counter()

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        """Return immediately: the event is complete."""

    def seconds_since(self, earlier: Event) -> float:
        if not isinstance(earlier, HostEvent):
            raise EngineError(f"This backend works with host events, was given {type(earlier).__name__}.")
        return self._moment - earlier._moment


class HostReading:
    """A copy that has been made."""

    def __init__(self, values: Array) -> None:
        self._values = values

    def done(self) -> bool:
        return True

    def result(self) -> Array:
        return self._values


class HostStream:
    """Does all work immediately."""

    def __init__(self, *, urgent: bool) -> None:
        self.urgent = urgent

    def write(self, buffer: Buffer, values: Array, *, at: int | None = None) -> None:
        np.copyto(_entry(buffer, at), values)

    def copy(self, source: Buffer, to: Buffer, *, source_at: int | None = None, at: int | None = None) -> None:
        """Raises IndexError, and EngineError for memory of another device, or another dtype or size."""
        given, entry = _entry(source, source_at), _entry(to, at)
        if (given.dtype, given.size) != (entry.dtype, entry.size):
            raise EngineError(
                f"A copy goes to {entry.dtype} {entry.shape}, was given {given.dtype} {given.shape}: "
                "both need the same dtype and size."
            )
        np.copyto(entry, given.reshape(entry.shape))

    def read(self, buffer: Buffer, *, at: int | None = None) -> HostReading:
        return HostReading(_entry(buffer, at).copy())

    def record(self, *, timed: bool = False) -> HostEvent:  # noqa: ARG002 - every host event is timed
        return HostEvent()

    def follow(self, event: Event) -> None:
        """Do nothing: host events are complete when they are recorded."""


class HostDevice:
    """The `Device` protocol but for `name` and `load`, which each CPU backend adds."""

    pads = False

    def __init__(self) -> None:
        self._in_use: Counter[str] = Counter()  # bytes by purpose

    def stream(self, name: str, *, urgent: bool = False) -> HostStream:  # noqa: ARG002 - host streams have no names
        return HostStream(urgent=urgent)

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike, *, purpose: str = "other") -> HostBuffer:
        try:
            array = np.zeros(shape, dtype)
        except MemoryError as error:
            raise EngineError(self._full(shape, dtype, purpose)) from error
        self._in_use[purpose] += array.nbytes
        # Once the array and every view of it are garbage: numpy's views keep the array that owns the memory alive.
        weakref.finalize(array, self._in_use.subtract, {purpose: array.nbytes}).atexit = False
        return HostBuffer(array)

    def end_warm_up(self) -> None:
        """There is nothing to save."""

    def memory(self) -> Mapping[str, int]:
        """Bytes of buffers. The memory that engines allocate themselves is not known."""
        return dict(+self._in_use)

    def uncaptured(self) -> Mapping[str, int]:
        """Nothing is to be captured on a CPU."""
        return {}

    def _full(self, shape: tuple[int, ...], dtype: DTypeLike, purpose: str) -> str:
        requested = math.prod(shape) * np.dtype(dtype).itemsize
        taken = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in self.memory().items()) or "nothing"
        return (
            f"This machine's memory is full: {requested / 2**20:.0f} MiB for {purpose} could not be allocated. "
            f"This process uses {taken}. "
            "Build with fewer --rows or a smaller --resolution, or stop other programs."
        )


def host_array(buffer: Buffer) -> Array:
    """The array behind `buffer`. Raises EngineError for memory of another device."""
    if not isinstance(buffer, HostBuffer):
        raise EngineError(f"This backend works on host memory, was given {type(buffer).__name__}.")
    return buffer.array


def bound_arrays(buffers: Mapping[str, Buffer], ports: Mapping[str, GraphPort], graph: str) -> dict[str, Array]:
    """The arrays behind `buffers`, for the `ports` of a graph that messages call `graph`.

    Raises:
        EngineError: names, dtypes or shapes differ, as where another graph has this one's name.
    """
    if ports.keys() != buffers.keys():
        raise EngineError(f"{graph} has the ports {', '.join(sorted(ports))}; {', '.join(sorted(buffers))} are bound.")
    arrays = {name: host_array(buffer) for name, buffer in buffers.items()}
    for name, array in arrays.items():
        if not ports[name].takes(array):
            raise EngineError(f"{graph}: {name} is {ports[name]}; {array.dtype} {list(array.shape)} is bound.")
    return arrays


def _entry(buffer: Buffer, at: int | None) -> Array:
    """A view of all of `buffer`, or of its entry `at`. Raises IndexError if there is no such entry."""
    array = host_array(buffer)
    if at is None:
        return array
    entry: Array = array[at, ...]  # with the ellipsis, an entry of a one-dimensional array is an array and no scalar
    return entry
