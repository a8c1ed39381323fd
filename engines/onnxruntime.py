"""ONNX Runtime over arrays of the host. On the CPU, engines read and write them in place; an execution provider with
memory of its own copies them in and out in each run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike

from engines.base import Array, Buffer, EngineError
from engines.host import HostBuffer, bound_arrays

CPU = "CPUExecutionProvider"


class OnnxRuntimeCall:
    """One run of a session over bound memory. Holds the arrays, so that they outlive the binding."""

    def __init__(
        self, session: ort.InferenceSession, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._inputs = inputs
        self._outputs = outputs
        self._in_place = session.get_providers() == [CPU]
        for name, array in outputs.items():
            self._binding.bind_output(name, *_location(array))
        self._bind_inputs()

    def run(self) -> None:
        try:
            if not self._in_place:
                self._bind_inputs()
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime raises a dozen unrelated classes
            raise EngineError(f"ONNX Runtime failed in a step: {error}") from error

    def _bind_inputs(self) -> None:
        """A provider with memory of its own takes its copy of an input here, and sees no later change."""
        for name, array in self._inputs.items():
            self._binding.bind_input(name, *_location(array))


def _location(array: Array) -> tuple[str, int, np.dtype[Any], tuple[int, ...], int]:
    return "cpu", 0, array.dtype, array.shape, array.ctypes.data


class OnnxRuntimeEngine:
    """An ONNX graph in an ONNX Runtime session."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._inputs = [tensor.name for tensor in session.get_inputs()]
        self._outputs = [tensor.name for tensor in session.get_outputs()]

    def bind(self, buffers: Mapping[str, Buffer]) -> OnnxRuntimeCall:
        arrays = bound_arrays(buffers, {*self._inputs, *self._outputs})
        inputs, outputs = ({name: arrays[name] for name in names} for names in (self._inputs, self._outputs))
        return OnnxRuntimeCall(self._session, inputs, outputs)


class OnnxRuntimeDevice:
    """This machine's processor, or what else an execution provider computes on, through ONNX Runtime."""

    def __init__(self, *, threads: int, provider: str = CPU) -> None:
        self.name = f"{provider.removesuffix('ExecutionProvider').lower()}, ONNX Runtime {ort.__version__}"
        self._threads = threads
        self._provider = provider

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> HostBuffer:
        return HostBuffer(np.zeros(shape, dtype))

    def load(self, path: Path) -> OnnxRuntimeEngine:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3  # errors only: optimiser warnings mean nothing to who runs a server
        try:
            session = ort.InferenceSession(path, options, providers=[self._provider])
        except Exception as error:  # ONNX Runtime raises a dozen unrelated classes
            raise EngineError(f"ONNX Runtime cannot load {path}: {error}") from error
        if self._provider not in session.get_providers():  # it falls back to the CPU with no more than a line of log
            raise EngineError(
                f"ONNX Runtime could not start its {self._provider}, so it would compute on the CPU. "
                "Often libraries are missing: pip install 'onnxruntime-gpu[cuda,cudnn]' brings them."
            )
        return OnnxRuntimeEngine(session)


def open_device(*, threads: int) -> OnnxRuntimeDevice:
    return OnnxRuntimeDevice(threads=threads)
