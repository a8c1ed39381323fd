"""What every backend offers: a device with memory, streams of work on it, and engines whose buffers are bound once and
run many times.

A bound `Call` is the unit of work: on a CPU it is one run of a session, on a GPU it is what a CUDA graph captures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]

# The denoise graph's contract with whoever plans its steps: graphs.py computes it, scheduler tables fill it.
MEMORY = 3  # K: lanes of scheduler memory
LANES = 1 + MEMORY + 1  # x, the memory, and the x0 estimate that previews show
TERMS = 3 + MEMORY  # what a lane is made of: x, the model's output, fresh noise, the memory
KEPT = 3  # what inpainting keeps of a picture: its latents, the noise over them, and where it stays as it is

# Prompts of several chunks share a step: shorter ones are repeated up to the longest, which attention does not notice,
# if repeated whole. So prompts have 1, 2, 3 or 6 chunks, the divisors of this.
MOST_CHUNKS = 6


class EngineError(Exception):
    """An engine or its bundle cannot do what was asked; the message says what to do about it."""


class DeviceLost(EngineError):
    """The device computes nothing more for this process, which has to end: another one may start anew."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A graph's input or output. Dimensions that vary between calls are named, the others are numbers."""

    name: str
    dtype: str  # numpy's name: float32, int64, uint8
    shape: tuple[int | str, ...]


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

    def settle(self) -> None:
        """Warming up is over: keep what was learned of it for the next start."""

    def memory(self) -> Mapping[str, int]:
        """Bytes of its memory in use here, by purpose."""


ALIGNMENT = 256  # bytes, of a view's offset: what TensorRT asks of an address


# Backends are imported when they are asked for, so a missing package costs only those who need it.
_BACKENDS = {
    "tensorrt": "engines.tensorrt",
    "tensorrt_rtx": "engines.tensorrt_rtx",
    "onnxruntime_cuda": "engines.onnxruntime_cuda",
    "openvino": "engines.openvino",
    "onnxruntime": "engines.onnxruntime",
}
ON_CPU = ("openvino", "onnxruntime")  # they load the FP32 graphs as they are, so every bundle can be served by them
EXTRAS = {
    "tensorrt": "cuda",
    "tensorrt_rtx": "rtx",
    "onnxruntime_cuda": "cuda",
    "openvino": "openvino",
    "onnxruntime": "cpu",
}
BACKENDS = tuple(_BACKENDS)  # the fastest first


def open_device(backend: str, *, threads: int = 0) -> Device:
    """Open the device behind `backend`, with `threads` CPU threads (0: one per core).

    Raises:
        EngineError: the name is unknown or its package is not installed.
    """
    if backend not in _BACKENDS:
        raise EngineError(f"There is no backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    try:
        module = import_module(_BACKENDS[backend])
    except ImportError as error:
        raise EngineError(needs(backend, str(error.name))) from error
    opener: Callable[..., Device] = module.open_device
    return opener(threads=threads)


def needs(backend: str, package: str) -> str:
    """What to tell people who lack the package behind a backend."""
    return f"Backend {backend} needs the package {package}: pip install 'latentd[{EXTRAS[backend]}]'."
