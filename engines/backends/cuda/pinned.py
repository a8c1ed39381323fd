"""Pinned host memory, which the GPU copies to and from while the host goes on."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import defaultdict, deque
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from engines.backends.cuda.context import CudaContext
from engines.backends.cuda.events import CudaEvent
from engines.backends.cuda.status import check
from engines.contract import Array

_PAGE = 4096  # bytes: CUDA pins whole pages, so a smaller block would take as much


class PinnedBlock:
    """Page-locked host memory. A copy may be using it until `event` is complete."""

    def __init__(self, cuda: CudaContext, size: int) -> None:
        calls = cuda.calls
        self.size = size  # bytes
        self.event = CudaEvent(cuda)
        self.address = int(check(calls.cudaHostAlloc(size, calls.cudaHostAllocDefault)))
        # With the event rather than its handle: garbage in a cycle is finalized in any order, the event perhaps first.
        cuda.releases.release_with(self, partial(_unpin, calls, self.address, self.event))

    def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """The memory as an array, without a copy; valid as long as this block lives."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        raw = (ctypes.c_uint8 * size).from_address(self.address)
        return np.ctypeslib.as_array(raw).view(dtype).reshape(shape)


def _unpin(calls: Any, address: int, event: CudaEvent) -> None:
    calls.cudaEventSynchronize(event.handle)  # a copy may still be under way
    calls.cudaFreeHost(address)


class PinnedPool:
    """The pinned blocks of one stream, in powers of two. A block is allocated only if none of its size is free."""

    def __init__(self, cuda: CudaContext) -> None:
        self._cuda = cuda
        self._used: dict[int, deque[PinnedBlock]] = defaultdict(deque)  # by size, the least recently used first

    def take(self, size: int) -> PinnedBlock:
        """A block of at least `size` bytes that no copy uses."""
        rounded = max(_PAGE, 1 << (size - 1).bit_length())
        used = self._used[rounded]
        # A stream works in order, so if the least recently used block is not free, none is.
        return used.popleft() if used and used[0].event.done() else PinnedBlock(self._cuda, rounded)

    def put(self, block: PinnedBlock) -> None:
        """Return `block` for reuse once its event is complete."""
        self._used[block.size].append(block)


class CudaReading:
    """A copy from the GPU in flight under the `Reading` protocol. Its pinned block is reused once this is garbage."""

    def __init__(self, block: PinnedBlock, shape: tuple[int, ...], dtype: np.dtype[Any], *, pool: PinnedPool) -> None:
        self._block = block
        self._shape = shape
        self._dtype = dtype
        weakref.finalize(self, pool.put, block).atexit = False

    def done(self) -> bool:
        return self._block.event.done()

    def result(self) -> Array:
        self._block.event.wait()
        return self._block.array(self._shape, self._dtype).copy()
