"""ONNX Runtime on the CPU. Engines read and write the bound arrays in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from engines.backends import cores
from engines.backends.device import Buffer, Reader, Stream
from engines.backends.host import GraphPort, HostDevice, HostStream, bound_arrays
from engines.contract import Array
from engines.errors import EngineError

FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"  # of a graph that is given as bytes
_DTYPES = {f"tensor({name})": name for name in ("int64", "int32", "uint8", "float16")} | {"tensor(float)": "float32"}
_PROVIDER = "CPUExecutionProvider"


class OnnxRuntimeCall:
    """One run of a session over bound arrays, which it keeps alive."""

    def __init__(
        self, session: ort.InferenceSession, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._arrays = inputs, outputs
        for name, array in inputs.items():
            self._binding.bind_input(name, *_location(array))
        for name, array in outputs.items():
            self._binding.bind_output(name, *_location(array))

    def launch(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime raises a dozen unrelated classes
            raise EngineError(f"ONNX Runtime failed in a step: {error}") from error


def _location(array: Array) -> tuple[str, int, np.dtype[Any], tuple[int, ...], int]:
    return "cpu", 0, array.dtype, array.shape, array.ctypes.data


def _port(tensor: ort.NodeArg) -> GraphPort:
    dtype = _DTYPES.get(tensor.type, "")
    return GraphPort(dtype, tuple(size if isinstance(size, int) else None for size in tensor.shape))


class OnnxRuntimeEngine:
    """An ONNX graph in an ONNX Runtime session."""

    def __init__(self, session: ort.InferenceSession, graph: str) -> None:
        """`graph` is the name for messages."""
        self._session, self._graph = session, graph
        self._inputs = {tensor.name: _port(tensor) for tensor in session.get_inputs()}
        self._outputs = {tensor.name: _port(tensor) for tensor in session.get_outputs()}

    def bind(self, buffers: Mapping[str, Buffer]) -> OnnxRuntimeCall:
        arrays = bound_arrays(buffers, self._inputs | self._outputs, self._graph)
        inputs, outputs = ({name: arrays[name] for name in names} for names in (self._inputs, self._outputs))
        return OnnxRuntimeCall(self._session, inputs, outputs)


class OnnxRuntimeDevice(HostDevice):
    """This machine's processor, with ONNX graphs in ONNX Runtime."""

    def __init__(self, *, threads: int, is_frugal: bool = False) -> None:
        """Where it is frugal, weights stay in their file and in its type, and are widened when a step reads them."""
        super().__init__()
        self.name = f"cpu, ONNX Runtime {ort.__version__}"
        self._threads = threads or cores.limit()
        self._is_frugal = is_frugal

    def load(self, path: Path, stream: Stream, *, read: Reader = Path.read_bytes) -> OnnxRuntimeEngine:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        # A memory pattern keeps a run's activations in one block, in addition to the arena: a quarter to a half more
        # memory (docs/benchmarks), and no faster.
        options.enable_mem_pattern = False
        if not (isinstance(stream, HostStream) and stream.urgent):
            # Each session has its own threads, which spin for a while after each run to start the next one sooner. That
            # makes steps a quarter faster, but the spinning of other sessions slows them down.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry(FOLDER_OF_WEIGHTS, str(path.parent))
        if self._is_frugal:  # the optimizers fold casts of weights, and kernels pack them: copies as large as the model
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.disable_prepacking", "1")
        options.log_severity_level = 3  # errors only: operators cannot act on the optimiser's warnings
        try:
            session = ort.InferenceSession(read(path), options, providers=[_PROVIDER])
        except EngineError:
            raise
        except Exception as error:  # ONNX Runtime raises a dozen unrelated classes
            raise EngineError(f"ONNX Runtime cannot load {path}: {error}") from error
        return OnnxRuntimeEngine(session, path.name)


def open_device(*, threads: int, is_frugal: bool = False) -> OnnxRuntimeDevice:
    return OnnxRuntimeDevice(threads=threads, is_frugal=is_frugal)
