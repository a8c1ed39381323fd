"""ONNX Runtime's CPU execution provider. Engines read and write the bound arrays in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike

from engines.base import Array, Buffer, EngineError
from engines.host import HostBuffer, bound_arrays


class OnnxRuntimeCall:
    """One run of a session over bound memory. Holds the arrays, so that they outlive the binding."""

    def __init__(self, session: ort.InferenceSession, binding: ort.IOBinding, arrays: Mapping[str, Array]) -> None:
        self._session = session
        self._binding = binding
        self._arrays = arrays

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
        arrays = bound_arrays(buffers, {*self._inputs, *self._outputs})
        binding = self._session.io_binding()
        for names, bind in ((self._inputs, binding.bind_input), (self._outputs, binding.bind_output)):
            for name in names:
                array = arrays[name]
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return OnnxRuntimeCall(self._session, binding, arrays)


class OnnxRuntimeDevice:
    """This machine's processor, through ONNX Runtime."""

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
