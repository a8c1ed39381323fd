"""The GPU's memory, and the device class that the GPU backends share."""

from __future__ import annotations

import itertools
import math
import weakref
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from engines.backends.cuda.buffers import Allocation, DeviceBuffer
from engines.backends.cuda.context import CudaContext
from engines.backends.cuda.discovery import FIRST_GPU, probe
from engines.backends.cuda.graphs import Captures
from engines.backends.cuda.status import MEMORY_IS_FULL, check
from engines.backends.cuda.streams import CudaStream
from engines.errors import EngineError
from engines.manifest import Gpu


class Cuda(CudaContext):
    """The first GPU as this process sees it: its memory, and how much of it each purpose uses.

    Memory comes from `cudaMalloc`. It is allocated while engines are loaded and never in a step, so speed matters
    little; and unlike a pool's, it belongs to no stream: freeing it waits for whatever still uses it.
    """

    def __init__(self, calls: Any = None) -> None:
        """Select the GPU for this thread; `calls` stands for `cuda.bindings.runtime`. Raises EngineError."""
        super().__init__(calls)
        self._ids = itertools.count()
        self._in_use: dict[int, tuple[str, int]] = {}  # purpose and bytes
        check(self.calls.cudaSetDevice(FIRST_GPU))
        # On a context of its own: in a cycle with this object it would be closed late.
        self._zeroing = CudaStream(CudaContext(self.calls, releases=self.releases))

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike, *, purpose: str = "other") -> DeviceBuffer:
        """Zeroed memory, aligned to `ALIGNMENT` and freed with its last reference.

        Raises:
            EngineError: the GPU's memory is full; names what uses how much of it, and what to do. DeviceLost.
        """
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = self._allocate(max(size, 1), purpose)  # at least a byte, so that every buffer has its own address
        self._zeroing.zero(memory)
        return DeviceBuffer(memory, shape, dtype)

    def memory(self) -> dict[str, int]:
        """Bytes in use by purpose, the largest first."""
        taken: Counter[str] = Counter()
        for purpose, size in list(self._in_use.values()):
            taken[purpose] += size
        return dict(taken.most_common())

    def free_memory(self) -> int:
        """Bytes of the GPU's memory that no process uses."""
        return int(check(self.calls.cudaMemGetInfo())[0])

    def track(self, owner: object, purpose: str, size: int) -> None:
        """Count `size` bytes, which a library allocated by itself, for as long as `owner` lives."""
        if size > 0:
            number = next(self._ids)
            self._in_use[number] = (purpose, size)
            weakref.finalize(owner, self._in_use.pop, number, None).atexit = False

    def describe_usage(self) -> str:
        """How much of the GPU's memory is used for what, as a sentence for error messages."""
        free, total = check(self.calls.cudaMemGetInfo())
        here = self.memory()
        listed = ", ".join(f"{purpose} {_format(size)}" for purpose, size in here.items()) or "nothing yet"
        others = max(total - free - sum(here.values()), 0)
        return (
            f"Of the GPU's {_format(total)} this process uses {listed}; CUDA itself and other programs use "
            f"{_format(others)}."
        )

    def _allocate(self, size: int, purpose: str) -> Allocation:
        self.releases.run_pending()
        result = self.calls.cudaMalloc(size)
        if result[0].name == "cudaErrorMemoryAllocation":
            self.calls.cudaGetLastError()  # cleared, or a library that looks for errors of its own would find it
            raise EngineError(
                f"The GPU's memory is full: {_format(size)} for {purpose} could not be allocated. "
                f"{self.describe_usage()} {MEMORY_IS_FULL}"
            )
        memory = Allocation(check(result), size)
        self.releases.release_with(memory, partial(self.calls.cudaFree, memory.address))
        self.track(memory, purpose, size)
        return memory


def open_cuda() -> tuple[Cuda, Gpu]:
    """The first GPU, for use by this thread. Raises EngineError if there is none."""
    found = probe()
    if found.gpu is None:
        raise EngineError(f"No GPU was found. {found.reason}")
    return Cuda(), found.gpu


class CudaDevice:
    """The `Device` protocol but for `load`, which each GPU backend adds."""

    pads = True  # a graph is captured for one shape

    def __init__(self, cuda: Cuda, *, name: str) -> None:
        self.name = name
        self._cuda = cuda
        self._captures = Captures()

    def stream(self, name: str, *, urgent: bool = False) -> CudaStream:  # noqa: ARG002 - CUDA's streams have no names
        return CudaStream(self._cuda, urgent=urgent)

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike, *, purpose: str = "other") -> DeviceBuffer:
        return self._cuda.allocate(shape, dtype, purpose=purpose)

    def end_warm_up(self) -> None:
        """Log which calls were not captured. There is nothing to save."""
        self._captures.report()

    def memory(self) -> Mapping[str, int]:
        return self._cuda.memory()

    def uncaptured(self) -> Mapping[str, int]:
        return self._captures.uncaptured()


def _format(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
