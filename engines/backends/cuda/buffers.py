"""GPU memory under the `Buffer` protocol."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from engines.backends.device import ALIGNMENT, Buffer
from engines.errors import EngineError


@dataclass(frozen=True, eq=False)
class Allocation:
    """A block of GPU memory. `Cuda` frees it once nothing refers to this object."""

    address: int
    size: int  # bytes


class DeviceBuffer:
    """A typed array in GPU memory: a whole allocation, or part of one."""

    def __init__(self, memory: Allocation, shape: tuple[int, ...], dtype: DTypeLike, *, start: int = 0) -> None:
        """`start` is the offset in bytes into `memory`."""
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._memory = memory
        self._start = start

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def address(self) -> int:
        return self._memory.address + self._start

    def view(self, shape: tuple[int, ...], dtype: DTypeLike, *, offset: int) -> DeviceBuffer:
        part = DeviceBuffer(self._memory, shape, dtype, start=self._start + offset)
        if offset % ALIGNMENT or not 0 <= offset <= self.nbytes - part.nbytes:
            raise ValueError(
                f"A view of {part.nbytes} bytes at offset {offset} does not fit into {self.nbytes} bytes "
                f"at a multiple of {ALIGNMENT}."
            )
        return part

    def entry(self, at: int | None) -> DeviceBuffer:
        """Entry `at` along the first axis, or the whole buffer for None. Raises IndexError."""
        if at is None:
            return self
        index = range(self.shape[0])[at]  # IndexError here, where an address beyond the end would overwrite others
        start = self._start + index * (self.nbytes // self.shape[0])
        return DeviceBuffer(self._memory, self.shape[1:], self.dtype, start=start)


def as_device_buffer(buffer: Buffer) -> DeviceBuffer:
    """`buffer`, typed as GPU memory. Raises EngineError for memory of another device."""
    if not isinstance(buffer, DeviceBuffer):
        raise EngineError(f"This backend works on GPU memory, was given {type(buffer).__name__}.")
    return buffer
