"""ONNX Runtime's CPU execution provider. Buffers are numpy arrays, and engines read and write them in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike

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
        np.copyto(self.array[at], _host(source).array)

    def read(self) -> Array:
        return self.array.copy()


class OnnxRuntimeCall:
    """One run of a session over bound memory. Holds the buffers, so that they outlive the binding."""

    def __init__(
        self, session: ort.InferenceSession, binding: ort.IOBinding, buffers: Mapping[str, HostBuffer]
    ) -> None:
        self._session = session
        self._binding = binding
        self._buffers = dict(buffers)

    def run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime raises a dozen unrelated classes
            raise EngineError(f"ONNX Runtime failed in a step: {error}") from error


class OnnxRuntimeEngine:
    """An ONNX graph in an ONNX Runtime session."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._inputs = [tensor.name for tensor in session.get_inputs()]
        self._outputs = [tensor.name for tensor in session.get_outputs()]

    def bind(self, buffers: Mapping[str, Buffer]) -> OnnxRuntimeCall:
        expected = {*self._inputs, *self._outputs}
        if expected != buffers.keys():
            raise EngineError(f"This graph takes {sorted(expected)}, was given {sorted(buffers)}.")
        hosts = {name: _host(buffer) for name, buffer in buffers.items()}
        binding = self._session.io_binding()
        for name in self._inputs:
            array = hosts[name].array
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name in self._outputs:
            array = hosts[name].array
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return OnnxRuntimeCall(self._session, binding, hosts)


class OnnxRuntimeDevice:
    """This machine's processor."""

    def __init__(self, *, threads: int) -> None:
        self.name = f"cpu, ONNX Runtime {ort.__version__}"
        self._threads = threads

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> HostBuffer:
        return HostBuffer(np.zeros(shape, dtype))

    def load(self, path: Path) -> OnnxRuntimeEngine:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3  # errors only: optimiser warnings mean nothing to who runs a server
        try:
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a dozen unrelated classes
            raise EngineError(f"ONNX Runtime cannot load {path}: {error}") from error
        return OnnxRuntimeEngine(session)


def open_device(*, threads: int) -> OnnxRuntimeDevice:
    return OnnxRuntimeDevice(threads=threads)


def _host(buffer: Buffer) -> HostBuffer:
    if not isinstance(buffer, HostBuffer):
        raise EngineError(f"ONNX Runtime on the CPU reads host memory, was given {type(buffer).__name__}.")
    return buffer
