"""A graph that a backend has loaded, as a function."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engines.backends.registry import open_device
from engines.contract import Array


class Loaded:
    """The graph at `path` on the device of `backend`."""

    def __init__(self, backend: str, path: Path, *, threads: int = 0) -> None:
        self._device = open_device(backend, threads=threads)
        self._stream = self._device.stream("test")
        self._engine = self._device.load(path, self._stream)

    def __call__(self, inputs: Mapping[str, Array], like: Mapping[str, Array]) -> dict[str, Array]:
        """Every output by name; `like` has arrays of their shapes and dtypes."""
        buffers = {name: self._device.allocate(array.shape, array.dtype) for name, array in {**inputs, **like}.items()}
        for name, array in inputs.items():
            self._stream.write(buffers[name], array)
        self._engine.bind(buffers).launch()
        return {name: self._stream.read(buffers[name]).result() for name in like}
