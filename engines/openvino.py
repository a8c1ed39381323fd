"""OpenVINO on the CPU, from the same ONNX graphs. Engines read and write the bound arrays in place."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from engines import cores
from engines.base import Array, Buffer, EngineError, Stream
from engines.host import HostDevice, bound_arrays

# OpenVINO reports to its makers whenever it is imported, unless this package of its own is missing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # None is how Python marks a missing one

import openvino as openvino  # noqa: E402, PLC0414 - only after that; and others in this package import it from here


class OpenVinoCall:
    """One inference request over bound memory. Holds the arrays, so that they outlive the request."""

    def __init__(self, request: openvino.InferRequest, arrays: Mapping[str, Array]) -> None:
        self._request = request
        self._arrays = arrays
        for name, array in arrays.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

    def launch(self) -> None:
        try:
            self._request.infer()
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed in a step: {error}") from error


class OpenVinoEngine:
    """An ONNX graph compiled by OpenVINO."""

    def __init__(self, compiled: openvino.CompiledModel) -> None:
        self._compiled = compiled
        self._names = {port.any_name for port in (*compiled.inputs, *compiled.outputs)}

    def bind(self, buffers: Mapping[str, Buffer]) -> OpenVinoCall:
        return OpenVinoCall(self._compiled.create_infer_request(), bound_arrays(buffers, self._names))


class OpenVinoDevice(HostDevice):
    """This machine's processor, through OpenVINO."""

    def __init__(self, *, threads: int) -> None:
        super().__init__()
        self.name = f"cpu, OpenVINO {openvino.__version__}"
        self._core = openvino.Core()
        self._options = {
            "PERFORMANCE_HINT": "LATENCY",
            # Where the processor has bfloat16 it would be taken unasked, and the picture would no longer be diffusers'.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        if threads := threads or cores.limit():
            self._options["INFERENCE_NUM_THREADS"] = str(threads)

    def load(self, path: Path, stream: Stream) -> OpenVinoEngine:  # noqa: ARG002 - the host's streams are all alike
        try:
            return OpenVinoEngine(self._core.compile_model(path, "CPU", self._options))
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot load {path}: {error}") from error


def open_device(*, threads: int) -> OpenVinoDevice:
    return OpenVinoDevice(threads=threads)
