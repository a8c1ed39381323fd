"""Statuses of CUDA as exceptions, and finding the GPU."""

from __future__ import annotations

import numpy as np
import pytest
from cuda.bindings import runtime

from engines.backends.cuda import CudaDevice, Probe, check, open_cuda, probe, status
from engines.backends.registry import install_command
from engines.errors import DeviceLost, EngineError
from tests.engines.backends.cuda.gpus import FOUND, filled, read, values
from tests.engines.backends.fake_cuda import FakeCuda


def test_a_lost_device_raises_in_every_call_that_waits(device: CudaDevice, fake: FakeCuda) -> None:
    stream = device.stream("work")
    buffer = filled(device, stream, 4)
    event, reading = stream.record(), stream.read(buffer)
    fake.lose("cudaErrorIllegalAddress")
    for waiting in (event.wait, event.done, reading.result, reading.done, stream.record, stream.check_alive):
        with pytest.raises(DeviceLost, match="CUDA error 700, an illegal memory access was encountered"):
            waiting()
    with pytest.raises(DeviceLost):
        stream.write(buffer, values(4))
    with pytest.raises(DeviceLost):
        device.allocate((4,), np.float32)


def test_an_ordinary_error_loses_nothing(device: CudaDevice, fake: FakeCuda) -> None:
    stream = device.stream("work")
    buffer = device.allocate((4,), np.float32)
    fake.fail("cudaMemcpyAsync", "cudaErrorInvalidValue")
    with pytest.raises(EngineError, match="CUDA error 1, invalid argument") as raised:
        stream.write(buffer, values(4))
    assert not isinstance(raised.value, DeviceLost)
    stream.write(buffer, values(4))
    np.testing.assert_array_equal(read(stream, buffer), values(4))


def test_every_status_that_cuda_calls_final_is_one() -> None:
    """Its own reference, as far as it says so: inconsistent, or to be relaunched."""
    final = ("inconsistent state", "must be terminated and relaunched")
    documented = {one.name for one in runtime.cudaError_t if any(text in (one.__doc__ or "") for text in final)}
    assert "cudaErrorIllegalAddress" in documented
    assert documented <= status.LOST
    assert {one.name for one in runtime.cudaError_t} >= status.LOST


def test_check_returns_the_values_of_a_success() -> None:
    success = runtime.cudaError_t.cudaSuccess
    assert (check((success,)), check((success, 5)), check((success, 5, 6))) == ((), 5, (5, 6))


def test_full_memory_elsewhere_says_what_to_do() -> None:
    with pytest.raises(EngineError, match=r"CUDA error 2, out of memory.* fewer --rows"):
        check((runtime.cudaError_t.cudaErrorMemoryAllocation,))


@pytest.mark.skipif(FOUND.gpu is not None, reason="there is a GPU")
def test_without_a_gpu_the_probe_gives_the_reason() -> None:
    assert FOUND.gpu is None
    assert "CUDA error" in FOUND.reason
    with pytest.raises(EngineError, match=r"No GPU was found\. CUDA error"):
        open_cuda()


@pytest.mark.gpu
@pytest.mark.skipif(FOUND.gpu is None, reason=FOUND.reason)
def test_with_a_gpu_the_probe_names_it() -> None:
    assert FOUND.gpu is not None
    assert FOUND.gpu.name
    assert not FOUND.reason


def test_the_probe_names_the_gpu_and_what_it_can(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda) -> None:
    for name in ("cudaGetDeviceCount", "cudaGetDeviceProperties"):
        monkeypatch.setattr(runtime, name, getattr(fake, name))
    found = probe().gpu
    assert found is not None
    assert (found.name, found.compute_capability) == ("Fake GPU", "8.9")


def test_without_cuda_python_the_probe_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "runtime", None)
    assert probe() == Probe(None, f"cuda-python is not installed: {install_command('cuda')}")


def test_whatever_is_raised_becomes_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: 1 / 0)
    assert probe() == Probe(None, "division by zero")
