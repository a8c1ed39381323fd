"""ONNX Runtime's CUDA execution provider, on our own GPU memory and streams.

If the provider supports every node of a graph, ONNX Runtime captures each bound call as a CUDA graph. Its rules, from
the provider's documentation and the sources of `cuda_graph.cc` and `inference_session.cc`:

- The first run of a call runs it several times: twice to allocate memory, once to capture, and once to replay. So a
  call's outputs must not be its inputs.
- A node that fails in a capture without breaking it ends the capture: what came before that node is kept under the
  number, and every later run with it replays that part, without an error. So a number is used for one capture only.
- Captured graphs belong to the thread that ran them, and to a number that the run options give.
- During a capture no thread may allocate GPU memory or query events, so warm up before other threads do.
- Inputs, outputs and all nodes have to be on the GPU, and their addresses and shapes must not change.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from engines.backends.cuda import (
    MEMORY_IS_FULL,
    CapturedCalls,
    Cuda,
    CudaDevice,
    CudaStream,
    DeviceBuffer,
    GraphCapture,
    Library,
    as_cuda_stream,
    as_device_buffer,
    load_libraries,
    open_cuda,
)
from engines.backends.device import Buffer, Reader, Stream
from engines.backends.onnxruntime import FOLDER_OF_WEIGHTS
from engines.backends.registry import install_command, outdated
from engines.errors import DeviceLost, EngineError

PROVIDER = "CUDAExecutionProvider"
BACKEND = "onnxruntime_cuda"
# What libonnxruntime_providers_cuda.so is linked to, and what it and cuDNN open by name; cuDNN finds its parts itself.
# ONNX Runtime's own `preload_dlls` looks only in the folder that it is installed in.
_LIBRARIES = (
    Library("libcudart.so.13", "cudart"),
    Library("libnvrtc.so.13", "nvrtc"),
    Library("libcublasLt.so.13", "cublasLt"),
    Library("libcublas.so.13", "cublas"),
    Library("libcurand.so.10", "curand"),
    Library("libcudnn.so.9", "cudnn", folder="cudnn"),
)
_NO_GRAPH = -1  # the number of a run without a CUDA graph


class OnnxRuntimeCudaCall:
    """One run of a session over bound memory, which it keeps alive."""

    def __init__(
        self,
        session: Any,
        memory: Mapping[str, DeviceBuffer],
        *,
        stream: CudaStream,
        capture: GraphCapture,
        numbers: Iterator[int],
    ) -> None:
        """`numbers` are free to identify a CUDA graph within the session."""
        self._session = session
        self._memory = memory
        self._stream = stream
        self._capture = capture
        self._numbers = numbers
        self._captured = False
        self._options = _run_options(_NO_GRAPH)
        self._binding = session.io_binding()
        for tensor in session.get_inputs():
            self._binding.bind_input(tensor.name, *_location(memory[tensor.name]))
        for tensor in session.get_outputs():
            self._binding.bind_output(tensor.name, *_location(memory[tensor.name]))

    def launch(self) -> None:
        """Enqueue the work: the first time captured, later on as one CUDA graph, or plainly if that failed."""
        if self._captured or not self._capture.wanted or not self._try_capture():
            self._run(self._options)

    def _try_capture(self) -> bool:
        """Run and capture. Returns whether that succeeded."""
        options = _run_options(next(self._numbers))
        try:
            with self._stream.captured_by_a_library():
                self._run(options)
        except DeviceLost:
            raise
        except EngineError as error:
            self._capture.failed(str(error))
            return False
        self._captured, self._options = True, options
        return True

    def _run(self, options: ort.RunOptions) -> None:
        try:
            self._session.run_with_iobinding(self._binding, options)
        except Exception as error:  # ONNX Runtime raises a dozen unrelated classes
            self._stream.abandon_capture()  # ONNX Runtime leaves it open if a node fails
            self._stream.check_alive()
            raise EngineError(f"ONNX Runtime failed in a step: {error}") from error


def _run_options(graph: int) -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    # Otherwise it waits for the GPU after each run. Releases before mid-2026 do so anyway when they replay a graph
    # (microsoft/onnxruntime#28686), which prevents the overlap of steps but changes no result.
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def _location(buffer: DeviceBuffer) -> tuple[str, int, np.dtype[Any], tuple[int, ...], int]:
    return "cuda", 0, buffer.dtype, buffer.shape, buffer.address


class OnnxRuntimeCudaEngine:
    """An ONNX graph in a session on one stream."""

    def __init__(self, session: Any, name: str, *, stream: CudaStream, captured: CapturedCalls) -> None:
        self._session = session
        self._name = name
        self._stream = stream
        self._captured = captured
        self._numbers = itertools.count(1)
        self._inputs = [one.name for one in session.get_inputs()]
        self._names = {*self._inputs, *(one.name for one in session.get_outputs())}

    def bind(self, buffers: Mapping[str, Buffer]) -> OnnxRuntimeCudaCall:
        if self._names != buffers.keys():
            raise EngineError(f"{self._name} takes {sorted(self._names)}, was given {sorted(buffers)}.")
        memory = {name: as_device_buffer(buffer) for name, buffer in buffers.items()}
        capture = self._captured.bound({name: memory[name].shape for name in self._inputs})
        return OnnxRuntimeCudaCall(self._session, memory, stream=self._stream, capture=capture, numbers=self._numbers)


class OnnxRuntimeCudaDevice(CudaDevice):
    """The first GPU, with ONNX graphs in ONNX Runtime."""

    def __init__(self, cuda: Cuda, *, runtime: Any = ort) -> None:
        """`runtime` stands for the module `onnxruntime`."""
        super().__init__(cuda, name=f"cuda, ONNX Runtime {runtime.__version__}")
        self._runtime = runtime

    def load(self, path: Path, stream: Stream, *, read: Reader = Path.read_bytes) -> OnnxRuntimeCudaEngine:
        cuda_stream, captured = as_cuda_stream(stream), self._captures.of(path)
        free = self._cuda.free_memory()
        session = self._session(path, read, cuda_stream, captured)
        # ONNX Runtime allocates memory for weights by itself. What it allocates in a step is not counted.
        self._cuda.track(session, f"{path.stem} weights", free - self._cuda.free_memory())
        return OnnxRuntimeCudaEngine(session, path.name, stream=cuda_stream, captured=captured)

    def _session(self, path: Path, read: Reader, stream: CudaStream, captured: CapturedCalls) -> Any:
        """A session with CUDA graphs, or one without them if ONNX Runtime refuses the first."""
        try:
            return self._start_session(path, read, stream, captures=True)
        except DeviceLost:
            raise
        except EngineError as error:
            refusal = error
        session = self._start_session(path, read, stream, captures=False)
        captured.rule_out(str(refusal))
        return session

    def _start_session(self, path: Path, read: Reader, stream: CudaStream, *, captures: bool) -> Any:
        """Raises EngineError if the session does not start, or would compute on the CPU."""
        options = self._runtime.SessionOptions()
        options.add_session_config_entry(FOLDER_OF_WEIGHTS, str(path.parent))
        # A pattern is one block for all that runs of one shape take. It comes on top of the blocks of the first run, so
        # that memory doubles, to save allocations that a captured call makes only once.
        options.enable_mem_pattern = False
        options.log_severity_level = 3  # errors only: operators cannot act on the optimiser's warnings
        try:
            # With the fallback it would print the error, and compute on the CPU.
            session = self._runtime.InferenceSession(
                read(path),
                options,
                providers=[(PROVIDER, _provider_options(stream, captures=captures))],
                enable_fallback=0,
            )
        except EngineError:
            raise
        except Exception as error:  # ONNX Runtime raises a dozen unrelated classes
            stream.check_alive()
            raise EngineError(self._not_loaded(path, str(error))) from error
        if PROVIDER not in session.get_providers():  # ONNX Runtime falls back to the CPU with only a log line
            raise EngineError(
                f"ONNX Runtime could not start its {PROVIDER}, so it would compute on the CPU. "
                "Often libraries are missing: pip install 'onnxruntime-gpu[cuda,cudnn]' brings them."
            )
        return session

    def _not_loaded(self, path: Path, error: str) -> str:
        if "memory" in error.lower():
            return f"{path} does not fit into the GPU's memory: {error} {self._cuda.describe_usage()} {MEMORY_IS_FULL}"
        return f"ONNX Runtime cannot load {path}: {error}"


def _provider_options(stream: CudaStream, *, captures: bool) -> dict[str, str]:
    return {
        "device_id": "0",
        "user_compute_stream": str(stream.handle),  # all kernels of the session run on it, in our order
        "do_copy_in_default_stream": "1",
        "enable_cuda_graph": str(int(captures)),
        "use_tf32": "0",  # on by default; its 10 mantissa bits are too few for the schedulers' tables
        # Exact sizes: powers of two could double what a large step takes, and would allocate during a capture.
        "arena_extend_strategy": "kSameAsRequested",
    }


def open_device(*, threads: int) -> OnnxRuntimeCudaDevice:  # noqa: ARG001 - every backend is opened alike
    """Open the GPU through ONNX Runtime.

    Raises:
        EngineError: it lacks CUDA or is too old, there is no GPU, or libraries are missing.
    """
    if PROVIDER not in ort.get_available_providers():
        raise EngineError(
            "The installed ONNX Runtime is for CPUs only: uninstall the package onnxruntime, then "
            f"{install_command('cuda')}"
        )
    if refusal := outdated(BACKEND, ort.__version__):
        raise EngineError(f"{refusal}: {install_command('cuda')}")
    cuda, _gpu = open_cuda()
    load_libraries(_LIBRARIES, needed_by=f"onnxruntime-gpu {ort.__version__}")
    return OnnxRuntimeCudaDevice(cuda)
