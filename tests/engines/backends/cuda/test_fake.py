"""The fake has the functions and checks of the real module."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime

from engines.backends.cuda import Cuda, CudaDevice, status
from engines.errors import DeviceLost
from tests.engines.backends.fake_cuda import FakeCuda

SOURCE = "\n".join(path.read_text() for path in sorted(Path(status.__file__).parent.glob("*.py")))


def uses(source: str) -> set[tuple[str, int]]:
    """The names of CUDA in `source`, with how many arguments each is given; -1 where it is not called."""
    tree = ast.parse(source)
    called = {id(node.func): len(node.args) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    handed = {  # partial(calls.cudaFree, address) is called later
        id(node.args[0]): len(node.args) - 1
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "partial"
    }
    return {
        (node.attr, called.get(id(node), handed.get(id(node), -1)))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("cuda") and node.attr != "cuda"
    }


def parameters(function: object) -> list[str]:
    assert callable(function)
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize(("name", "arguments"), sorted(uses(SOURCE)))
def test_what_is_called_of_cuda_is_there_and_takes_so_many(name: str, arguments: int) -> None:
    for owner in (runtime, runtime.cudaMemcpyKind, runtime.cudaStreamCaptureMode):
        if hasattr(owner, name):
            assert arguments == -1 or len(parameters(getattr(owner, name))) == arguments
            return
    pytest.fail(f"CUDA has no {name}")


def test_much_is_called_of_cuda() -> None:
    found = uses(SOURCE)
    assert {("cudaMemcpyAsync", 5), ("cudaFree", 1), ("cudaEventBlockingSync", -1)} <= found


@pytest.mark.parametrize("name", [name for name in vars(FakeCuda) if name.startswith("cuda")])
def test_the_fake_has_only_what_cuda_has(name: str) -> None:
    faked, real = getattr(FakeCuda, name), getattr(runtime, name)
    if inspect.isfunction(faked):
        assert parameters(faked) == parameters(real)
    else:
        assert faked == real


def test_the_fake_notices_memory_that_is_not_there(fake: FakeCuda) -> None:
    cuda = Cuda(fake)
    handle = cuda._zeroing.handle
    pinned = fake.cudaHostAlloc(64, 0)[1]
    memory = fake.cudaMalloc(64)[1]
    pageable = np.zeros(64, np.uint8)
    to_gpu = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    assert fake.cudaMemcpyAsync(memory, pinned, 64, to_gpu, handle) == (runtime.cudaError_t.cudaSuccess,)
    for to, source, size in ((memory, pinned, 65), (memory, pageable.ctypes.data, 64), (pinned, pinned, 64)):
        other = FakeCuda()
        other.blocks, other._streams = fake.blocks, fake._streams
        assert other.cudaMemcpyAsync(to, source, size, to_gpu, handle) == (runtime.cudaError_t.cudaErrorInvalidValue,)
        assert "are not in allocated" in other.faults[0]
        assert other.cudaStreamQuery(handle) == (runtime.cudaError_t.cudaErrorIllegalAddress,)


def test_the_fake_notices_memory_that_is_freed_too_early() -> None:
    fake = FakeCuda()
    stream = CudaDevice(Cuda(fake), name="Fake").stream("work")
    memory = fake.cudaMalloc(64)[1]
    with fake.gate(stream.handle):
        assert fake.cudaMemsetAsync(memory, 1, 64, stream.handle) == (runtime.cudaError_t.cudaSuccess,)
        fake.give_back(memory)
        mark = stream.record()
    with pytest.raises(DeviceLost):
        mark.wait()
    assert "64 bytes at" in fake.faults[0]


def test_the_fake_refuses_in_a_capture_what_cuda_refuses(device: CudaDevice, fake: FakeCuda) -> None:
    stream = device.stream("work")
    mode = runtime.cudaStreamCaptureMode
    success, begin, end = runtime.cudaError_t.cudaSuccess, fake.cudaStreamBeginCapture, fake.cudaStreamEndCapture
    event = stream.record()
    event.wait()
    refusals: tuple[Callable[[], Any], ...] = (
        lambda: fake.cudaStreamSynchronize(stream.handle),
        lambda: fake.cudaStreamQuery(stream.handle),
        lambda: fake.cudaMalloc(4),
        lambda: fake.cudaFree(0),
        lambda: fake.cudaEventQuery(event.handle),
    )
    for refused in refusals:
        assert begin(stream.handle, mode.cudaStreamCaptureModeThreadLocal) == (success,)
        assert refused()[0] == runtime.cudaError_t.cudaErrorStreamCaptureUnsupported
        assert end(stream.handle)[0] == runtime.cudaError_t.cudaErrorStreamCaptureInvalidated
