"""ONNX Runtime's CUDA execution provider, over the GPU's memory and streams.

Where its provider can compute a whole graph, ONNX Runtime captures each bound call as a CUDA graph. Its rules, from its
documentation of the provider and the sources of `cuda_graph.cc` and `inference_session.cc`:

- The first run of a call is several: two that allocate what they need, then one that is captured, then its replay. So
  a call's outputs must not be its inputs.
- Captured graphs belong to the thread that ran them, and to a number that the run names.
- While it captures, no thread may allocate the GPU's memory or ask for its events; so warm up before others do.
- Inputs, outputs and all nodes have to be on the GPU, and their addresses and shapes stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from engines.backends.cuda import (
    MEMORY_IS_FULL,
    Cuda,
    CudaDevice,
    CudaStream,
    DeviceBuffer,
    Graphs,
    of_cuda,
    on_gpu,
    open_cuda,
)
from engines.backends.device import Buffer, Stream
from engines.backends.registry import install_command
from engines.errors import DeviceLost, EngineError

PROVIDER = "CUDAExecutionProvider"
_NOT_CAPTURED = -1  # the number of a run that captures and replays nothing


class OnnxRuntimeCudaCall:
    """One run of a session over bound memory. Holds the memory, so that it outlives the binding."""

    def __init__(
        self, session: Any, memory: Mapping[str, DeviceBuffer], *, stream: CudaStream, graphs: Graphs, number: int
    ) -> None:
        """`number` is that of the call's CUDA graph."""
        self._session = session
        self._memory = memory
        self._stream = stream
        self._graphs = graphs
        self._captured = False
        self._as_graph, self._plainly = _run_options(number), _run_options(_NOT_CAPTURED)
        self._binding = session.io_binding()
        for tensor in session.get_inputs():
            self._binding.bind_input(tensor.name, *_location(memory[tensor.name]))
        for tensor in session.get_outputs():
            self._binding.bind_output(tensor.name, *_location(memory[tensor.name]))

    def launch(self) -> None:
        if not self._captured and self._graphs.possible:
            self._captured = self._capture()
            if self._captured:
                return
        self._run(self._as_graph if self._captured else self._plainly)

    def _capture(self) -> bool:
        """Whether it was captured, and run."""
        try:
            self._run(self._as_graph)
        except DeviceLost:
            raise
        except EngineError as error:
            self._graphs.forbid(str(error))
            return False
        return True

    def _run(self, options: ort.RunOptions) -> None:
        try:
            self._session.run_with_iobinding(self._binding, options)
        except Exception as error:  # ONNX Runtime raises a dozen unrelated classes
            self._stream.abandon_capture()  # it leaves one open where a node of it fails
            self._stream.check_alive()
            raise EngineError(f"ONNX Runtime failed in a step: {error}") from error


def _run_options(graph: int) -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    # It would wait for the GPU after each run. Releases before the summer of 2026 do so all the same when they replay a
    # graph (microsoft/onnxruntime#28686), which costs the overlap of steps and nothing else.
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def _location(buffer: DeviceBuffer) -> tuple[str, int, np.dtype[Any], tuple[int, ...], int]:
    return "cuda", 0, buffer.dtype, buffer.shape, buffer.address


class OnnxRuntimeCudaEngine:
    """An ONNX graph in a session on one stream."""

    def __init__(self, session: Any, name: str, *, stream: CudaStream, graphs: Graphs) -> None:
        self._session = session
        self._name = name
        self._stream = stream
        self._graphs = graphs
        self._numbers = itertools.count(1)
        self._names = {one.name for one in (*session.get_inputs(), *session.get_outputs())}

    def bind(self, buffers: Mapping[str, Buffer]) -> OnnxRuntimeCudaCall:
        if self._names != buffers.keys():
            raise EngineError(f"{self._name} takes {sorted(self._names)}, was given {sorted(buffers)}.")
        memory = {name: on_gpu(buffer) for name, buffer in buffers.items()}
        number = next(self._numbers)
        return OnnxRuntimeCudaCall(self._session, memory, stream=self._stream, graphs=self._graphs, number=number)


class OnnxRuntimeCudaDevice(CudaDevice):
    """The first GPU, through ONNX Runtime."""

    def __init__(self, cuda: Cuda, *, runtime: Any = ort) -> None:
        """Over `onnxruntime`, or what stands for it."""
        super().__init__(cuda, name=f"cuda, ONNX Runtime {runtime.__version__}")
        self._runtime = runtime

    def load(self, path: Path, stream: Stream) -> OnnxRuntimeCudaEngine:
        own, graphs = of_cuda(stream), Graphs(path.name)
        free = self._cuda.free()
        session = self._session(path, own, graphs)
        # ONNX Runtime takes the memory for weights by itself; what it takes for a step shows in no count but the GPU's.
        self._cuda.note(session, f"{path.stem} weights", free - self._cuda.free())
        return OnnxRuntimeCudaEngine(session, path.name, stream=own, graphs=graphs)

    def _session(self, path: Path, stream: CudaStream, graphs: Graphs) -> Any:
        """A session that captures, or one that does not, where ONNX Runtime accepts no other."""
        try:
            return self._started(path, stream, captures=True)
        except DeviceLost:
            raise
        except EngineError as error:
            refusal = error
        session = self._started(path, stream, captures=False)
        graphs.forbid(str(refusal))
        return session

    def _started(self, path: Path, stream: CudaStream, *, captures: bool) -> Any:
        """Raises EngineError where there is no such session, or it would compute on the CPU."""
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3  # errors only: optimiser warnings mean nothing to who runs a server
        try:
            # By itself it would take the CPU instead of telling why not, and print that.
            session = self._runtime.InferenceSession(
                path, options, providers=[(PROVIDER, _provider_options(stream, captures=captures))], enable_fallback=0
            )
        except Exception as error:  # ONNX Runtime raises a dozen unrelated classes
            stream.check_alive()
            raise EngineError(self._not_loaded(path, str(error))) from error
        if PROVIDER not in session.get_providers():  # it falls back to the CPU with no more than a line of log
            raise EngineError(
                f"ONNX Runtime could not start its {PROVIDER}, so it would compute on the CPU. "
                "Often libraries are missing: pip install 'onnxruntime-gpu[cuda,cudnn]' brings them."
            )
        return session

    def _not_loaded(self, path: Path, error: str) -> str:
        if "memory" in error.lower():
            return f"{path} does not fit into the GPU's memory: {error} {self._cuda.holders()} {MEMORY_IS_FULL}"
        return f"ONNX Runtime cannot load {path}: {error}"


def _provider_options(stream: CudaStream, *, captures: bool) -> dict[str, str]:
    return {
        "device_id": "0",
        "user_compute_stream": str(stream.handle),  # one stream a session: all its kernels are on it, in our order
        "do_copy_in_default_stream": "1",
        "enable_cuda_graph": str(int(captures)),
        "use_tf32": "0",  # on by default, and 10 bits of FP32's 23 are too few for schedulers' tables
        # As much as is asked for. Powers of two would double what a large step takes, and ask for more in a capture.
        "arena_extend_strategy": "kSameAsRequested",
    }


def open_device(*, threads: int) -> OnnxRuntimeCudaDevice:  # noqa: ARG001 - every backend is opened alike
    """Open the GPU through ONNX Runtime. Raises EngineError where the installed ONNX Runtime has no CUDA, or no GPU."""
    if PROVIDER not in ort.get_available_providers():
        raise EngineError(
            "The installed ONNX Runtime is for CPUs only: uninstall the package onnxruntime, then "
            f"{install_command('cuda')}"
        )
    ort.preload_dlls()  # finds the libraries of CUDA and cuDNN where pip has put them
    cuda, _gpu = open_cuda()
    return OnnxRuntimeCudaDevice(cuda)
