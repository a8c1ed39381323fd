"""Buffers in the host's own memory, for the backends that compute there."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engines.base import Array, Buffer, EngineError


class HostBuffer:
    """A numpy array under the `Buffer` protocol."""

    def __init__(self, array: Array) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def write(self, values: Array, *, at: int | None = None) -> None:
        np.copyto(self.array if at is None else self.array[at], values)

    def copy_from(self, source: Buffer, *, at: int) -> None:
        np.copyto(self.array[at], host_array(source))

    def read(self, *, at: int | None = None) -> Array:
        array: Array = self.array if at is None else self.array[at]
        return array.copy()


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
