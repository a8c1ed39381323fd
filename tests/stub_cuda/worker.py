"""Runs graphs, or the executor, on ONNX Runtime's CUDA execution provider over the stub, in a process of its own.

python -m tests.stub_cuda.worker TASK.json, in the environment that `conftest.Stub.run` makes. The stub writes down what
is asked of it; results of our own go to the file that the task names.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime as ort

from engines.backends import onnxruntime_cuda
from engines.backends.cuda import Cuda, CudaStream, check
from engines.backends.cuda.pinned import CudaReading
from engines.backends.onnxruntime_cuda import OnnxRuntimeCudaDevice
from engines.contract import Array
from engines.errors import EngineError
from engines.manifest import Gpu
from tests.stub_cuda.runtime import StubRuntime

GPU = Gpu(name="Stub H200", compute_capability="9.0")
_DTYPES = {"float": np.float32, "float16": np.float16, "int64": np.int64, "uint8": np.uint8, "bool": np.bool_}


@dataclass(frozen=True)
class Task:
    """What to run, and what to do differently from the backend."""

    result: str  # the file to write to
    cudart: str
    graph: str = ""  # the path of an ONNX graph
    bundle: str = ""  # or a bundle, whose executor is run; without either, captures do what they must not
    rows: Sequence[int] = (8, 4, 2)  # to bind the graph for, in this order
    sides: Sequence[int] = (16, 64)  # of latents and images
    launches: bool = True
    captures: bool = True
    provider: Sequence[tuple[str, str]] = ()  # options of the provider
    memory_pattern: bool | None = None
    version: str = ""  # that ONNX Runtime claims to be


def as_json(task: Task) -> str:
    return json.dumps(asdict(task))


@contextmanager
def opened(task: Task) -> Iterator[tuple[OnnxRuntimeCudaDevice, StubRuntime]]:
    """The backend's device as the server opens it, over the stub."""
    stub = StubRuntime(Path(task.cudart))
    options, session = onnxruntime_cuda._provider_options, ort.InferenceSession

    def start(model: bytes, given: ort.SessionOptions, **arguments: Any) -> Any:
        given.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if task.graph:
            given.optimized_model_filepath = f"{task.result}.onnx"
        if task.memory_pattern is not None:
            given.enable_mem_pattern = task.memory_pattern
        return session(model, given, **arguments)

    with (
        patch.object(onnxruntime_cuda, "open_cuda", lambda: (Cuda(stub), GPU)),
        patch.object(
            onnxruntime_cuda, "_provider_options", lambda *a, **k: {**options(*a, **k), **dict(task.provider)}
        ),
        patch.object(ort, "InferenceSession", start),
        patch.object(ort, "__version__", task.version or ort.__version__),
    ):
        yield onnxruntime_cuda.open_device(threads=0), stub


def run_graph(task: Task) -> dict[str, Any]:
    """Bind the graph for each number of rows, twice as for two state buffers; launch all calls, and all again."""
    with opened(task) as (device, stub):
        stub.mark("load")
        engine = device.load(Path(task.graph), device.stream("steps"))
        stub.mark("bind")
        session = engine._session
        calls = [
            (rows, engine.bind(_buffers(device, session, rows, task.sides)))
            for rows in task.rows
            for _parity in range(2)
        ]
        for rows, call in calls if task.launches else []:
            stub.mark(f"warm up {rows}")
            if not task.captures:
                call._capture = type("Uncaptured", (), {"wanted": False})()
            call.launch()
        stub.mark("replay")
        for _rows, call in calls if task.launches else []:
            call.launch()
        stub.mark("end")
        return {
            "nodes": _nodes(session),
            "copies": _copies(Path(f"{task.result}.onnx")),
            "uncaptured": sum(device.uncaptured().values()),
            "calls": len(calls),
        }


def run_bundle(task: Task) -> dict[str, Any]:
    """Start the executor over the bundle, and draw two images in requests of different sizes of batch."""
    from tests.support.executing import Running  # noqa: PLC0415 - only this task needs the server

    with opened(task) as (device, stub):

        def open_it() -> OnnxRuntimeCudaDevice:
            device._cuda = Cuda(stub)  # of the executor's thread, as the server opens it there
            return device

        stub.mark("start")
        with _all_finite(), Running(Path(task.bundle), open_it, backend="onnxruntime_cuda") as running:
            assert not running.failures, running.failures
            stub.mark("serve")
            asked = [running.ask(num_inference_steps=4, num_images=images) for images in (1, 2)]
            drawn = sum(len(one.images()) for one in asked)
            stub.mark("end")
            return {"drawn": drawn, "uncaptured": sum(device.uncaptured().values()), "memory": dict(device.memory())}


def _all_finite() -> AbstractContextManager[object]:
    """Let each verdict about an image be good: no kernel writes it, and 0 is not finite."""
    result = CudaReading.result

    def read(reading: CudaReading) -> Array:
        array = result(reading)
        return np.ones_like(array) if array.ndim == 1 and array.dtype == np.float32 else array

    return patch.object(CudaReading, "result", read)


def misuse(task: Task) -> dict[str, Any]:
    """Do in captures what CUDA refuses, and what goes wrong later on."""
    stub = StubRuntime(Path(task.cudart))
    cuda = Cuda(stub)
    stream, host = CudaStream(cuda), np.ones(64, np.float32)
    to = cuda.allocate(host.shape, host.dtype)

    def upload() -> None:
        kind = stub.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(stub.cudaMemcpyAsync(to.address, host.ctypes.data, host.nbytes, kind, stream.handle))

    graph = stream.capture(upload, keep=())
    graph.launch()
    host[0] = 2
    graph.launch()
    refused: tuple[tuple[Callable[..., tuple[Any, ...]], int], ...] = (
        (stub.cudaMalloc, 64),
        (stub.cudaFree, to.address),
        (stub.cudaStreamSynchronize, stream.handle),
    )
    for call, argument in refused:
        with suppress(EngineError):
            stream.capture(partial(_checked, call, argument), keep=())
    stub.mark("end")
    return {}


def _checked(call: Callable[..., tuple[Any, ...]], argument: int) -> None:
    check(call(argument))


def _buffers(device: OnnxRuntimeCudaDevice, session: Any, rows: int, sides: Sequence[int]) -> dict[str, Any]:
    latent, image = sides
    most = {"S": rows + 1, "C": 6 * rows + 32, "P": rows + 1, "L": 1, "h": latent, "w": latent, "H": image, "W": image}
    most |= {"Q": 32, "A": 4}  # of LoRAs: ranks of the pool, and of a row

    def allocate(tensor: Any) -> Any:
        shape = tuple(dim if isinstance(dim, int) else most.get(dim, rows) for dim in tensor.shape)
        dtype = _DTYPES[tensor.type.removeprefix("tensor(").removesuffix(")")]
        assert math.prod(shape) > 0
        return device.allocate(shape, dtype)

    return {tensor.name: allocate(tensor) for tensor in (*session.get_inputs(), *session.get_outputs())}


def _nodes(session: Any) -> dict[str, list[str]]:
    """The operators of the optimised graph, by execution provider."""
    placed: dict[str, list[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        placed.setdefault(part.ep_name, []).extend(node.op_type for node in part.get_nodes())
    return placed


def _copies(optimised: Path) -> int:
    """How many nodes copy between the GPU and the host."""
    nodes = onnx.load(optimised, load_external_data=False).graph.node
    return sum(node.op_type.startswith("Memcpy") for node in nodes)


def main() -> None:
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    run = run_graph if task.graph else run_bundle if task.bundle else misuse
    Path(task.result).write_text(json.dumps(run(task)))


if __name__ == "__main__":
    main()
