"""What every backend offers: a device with memory, and engines whose buffers are bound once and run many times.

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


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A graph's input or output. Dimensions that vary between calls are named, the others are numbers."""

    name: str
    dtype: str  # numpy's name: float32, int64, uint8
    shape: tuple[int | str, ...]


class Buffer(Protocol):
    """Memory on the device, of one shape and dtype as long as it lives."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def write(self, values: Array, *, at: int | None = None) -> None:
        """Copy `values` in: the whole buffer, or its entry `at` along the first axis."""

    def copy_from(self, source: Buffer, *, at: int) -> None:
        """Copy the whole of `source` into entry `at`, without leaving the device."""

    def read(self, *, at: int | None = None) -> Array:
        """Return a copy on the host: of the whole buffer, or of its entry `at` along the first axis."""


class Call(Protocol):
    """An engine with every input and output bound."""

    def run(self) -> None:
        """Compute the outputs. Raises EngineError."""


class Engine(Protocol):
    """One compiled graph behind one backend."""

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        """Fix the memory of every input and output by name. Raises EngineError for a name that does not fit."""


class Device(Protocol):
    """Where engines run. One thread owns it."""

    name: str

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        """Return zeroed memory on the device."""

    def load(self, path: Path) -> Engine:
        """Load the graph at `path`, which the caller has checked by hash. Raises EngineError."""


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
