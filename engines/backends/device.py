"""The protocols that a backend implements.

A `Device` allocates `Buffer`s, opens `Stream`s and loads `Engine`s. An engine is bound once to buffers for all of its
inputs and outputs, which gives a `Call`. Calls are launched many times, with new contents in the same buffers:

    stream = device.stream("denoise", urgent=True)
    engine = device.load(path, stream)
    x, y = device.allocate((2, 4), np.float32), device.allocate((2, 4), np.float32)
    call = engine.bind({"x": x, "y": y})
    stream.write(x, values)
    call.launch()
    stream.read(y).result()

To add a backend, implement these protocols in a module with a function `open_device(*, threads: int) -> Device`, and
describe it in `engines.backends.registry`. `engines.backends.host` implements everything but `Device.load` for
backends that compute on the CPU, and `engines.backends.cuda` for those that compute on an NVIDIA GPU.

Unless stated otherwise, methods may raise:

- `EngineError`: the operation failed, and the device stays usable.
- `DeviceLost`, a kind of `EngineError`: every further call would fail as well, so the process has to be restarted.

Everything is called from one thread, the one that opened the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from numpy.typing import DTypeLike

from engines.contract import Array

Reader = Callable[[Path], bytes]  # the contents of the file at a path
ALIGNMENT = 256  # bytes; offsets of views are multiples of it, as TensorRT requires of addresses


class Buffer(Protocol):
    """An array in the device's memory with a fixed shape and dtype, freed with its last reference."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def view(self, shape: tuple[int, ...], dtype: DTypeLike, *, offset: int) -> Buffer:
        """A part of this memory from byte `offset` on, with its own shape and dtype. It keeps the memory alive.

        Raises:
            ValueError: the part is not inside this buffer, or `offset` is not a multiple of `ALIGNMENT`.
        """


class Event(Protocol):
    """A point in a stream's work, complete once all work enqueued before it is done."""

    def done(self) -> bool:
        """Whether the event is complete. Does not wait."""

    def wait(self) -> None:
        """Block until the event is complete."""

    def seconds_since(self, earlier: Event) -> float:
        """The device time between two complete events that were recorded with `timed=True`, in seconds."""


class Reading(Protocol):
    """A copy from the device to the host in flight."""

    def done(self) -> bool:
        """Whether the values have arrived. Does not wait."""

    def result(self) -> Array:
        """The values, once they have arrived. Each call returns an array of its own."""


class Stream(Protocol):
    """A queue of work that the device does in order, while the host and other streams go on.

    A device without asynchronous streams does all work immediately; its events are complete when they are recorded.
    """

    def write(self, buffer: Buffer, values: Array, *, at: int | None = None) -> None:
        """Copy `values` into `buffer`, or into its entry `at` along the first axis.

        The values are broadcast and cast as by `numpy.copyto`. The caller may change them as soon as this returns.

        Raises:
            IndexError: there is no entry `at`.
            ValueError: the shapes do not broadcast.
        """

    def copy(self, source: Buffer, to: Buffer, *, source_at: int | None = None, at: int | None = None) -> None:
        """Copy `source`, or its entry `source_at`, into `to`, or into its entry `at`, within the device.

        Raises:
            IndexError: there is no such entry.
            EngineError: the dtypes or the numbers of elements differ.
        """

    def read(self, buffer: Buffer, *, at: int | None = None) -> Reading:
        """Start to copy `buffer`, or its entry `at` along the first axis, to the host. Raises IndexError."""

    def record(self, *, timed: bool = False) -> Event:
        """An event after all work enqueued so far. Only timed events measure time, which costs a little."""

    def follow(self, event: Event) -> None:
        """Make work enqueued from now on wait for `event`, usually of another stream. Does not block the host."""


class Call(Protocol):
    """An engine with every input and output bound to a buffer. It keeps them alive."""

    def launch(self) -> None:
        """Enqueue one run on the engine's stream. The first launches may take seconds, to compile and to capture.

        Raises:
            EngineError: the run was not enqueued, and nothing has changed.
        """


class Engine(Protocol):
    """One graph, loaded for one stream."""

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        """Fix the buffer of every input and output, by name.

        A buffer may be bound to several calls, but not both to an input and to an output of the same call.

        Raises:
            EngineError: names, dtypes or shapes are not those of the graph, or of a profile it was built for.
        """


class Device(Protocol):
    """A processor that engines run on, with its memory."""

    name: str  # for logs and the API, such as "NVIDIA L4, TensorRT 11.4.0"
    pads: bool  # whether steps are padded to the row buckets, because engines are built or captured for fixed shapes

    def stream(self, name: str, *, urgent: bool = False) -> Stream:
        """Open a stream. The device prefers the work of urgent streams; `name` is for profilers."""

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike, *, purpose: str = "other") -> Buffer:
        """Allocate zeroed memory, counted under `purpose`.

        Raises:
            EngineError: memory is full; the message lists what uses how much, and what to do.
        """

    def load(self, path: Path, stream: Stream, *, read: Reader = Path.read_bytes) -> Engine:
        """Load the graph or engine at `path` to run on `stream`.

        Loading may execute code in the file: check its hash first, and have `read` return the bytes that were hashed.
        Weights of a graph are opened by their paths, and on CPUs they stay mapped: check afterwards that those are the
        files that were hashed, and now and then that they still are. OpenVINO opens the graph by its path as well.

        Raises:
            EngineError: also what `read` raises.
        """

    def end_warm_up(self) -> None:
        """Called once every call has been launched: save what was compiled, for the next start."""

    def memory(self) -> Mapping[str, int]:
        """Bytes of the device's memory that this process uses, by purpose."""

    def uncaptured(self) -> Mapping[str, int]:
        """Calls that run slower, without a CUDA graph, although they were to be captured, by engine, 0 included.

        Empty on devices that capture none. May be called from any thread.
        """
