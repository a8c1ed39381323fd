"""Buffers on the GPU, over host memory; where there is a GPU, over its own as well."""

from __future__ import annotations

import numpy as np
import pytest
from cuda import core
from cuda.bindings import runtime

from engines import cuda
from engines.base import Array, EngineError
from engines.cuda import DeviceBuffer, Probe, Stream, check, open_stream, probe
from engines.host import HostBuffer
from tests.engines.fake_tensorrt import HostMemory, HostRuntime, host_stream

FOUND = probe()
ON_A_GPU = pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(FOUND.gpu is None, reason=FOUND.reason)])


@pytest.fixture(params=["host", ON_A_GPU])
def stream(request: pytest.FixtureRequest) -> Stream:
    return open_stream() if request.param == "gpu" else host_stream()


def values(*shape: int) -> Array:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def filled(stream: Stream, *shape: int) -> DeviceBuffer:
    buffer = DeviceBuffer(shape, np.float32, stream)
    buffer.write(values(*shape))
    return buffer


def test_a_buffer_is_zero_when_made(stream: Stream) -> None:
    buffer = DeviceBuffer((3, 5), np.int64, stream)
    np.testing.assert_array_equal(buffer.read(), np.zeros((3, 5), np.int64))
    assert (buffer.shape, buffer.dtype, buffer.nbytes) == ((3, 5), np.dtype(np.int64), 120)


def test_what_was_written_is_read(stream: Stream) -> None:
    np.testing.assert_array_equal(filled(stream, 2, 3).read(), values(2, 3))


def test_the_written_array_may_be_reused_and_the_read_one_kept(stream: Stream) -> None:
    buffer = DeviceBuffer((2, 3), np.float32, stream)
    array = values(2, 3)
    buffer.write(array)
    array[:] = 7
    read = buffer.read()
    buffer.write(array)
    np.testing.assert_array_equal(read, values(2, 3))


@pytest.mark.parametrize(
    "given", [values(3, 2).T, values(2, 3).astype(np.float64), np.float32(4), values(1, 2, 3)], ids=str
)
def test_what_is_laid_out_otherwise_is_written_as_to_a_host_buffer(stream: Stream, given: Array) -> None:
    device, host = DeviceBuffer((2, 3), np.float32, stream), HostBuffer(np.zeros((2, 3), np.float32))
    device.write(np.asarray(given))
    host.write(np.asarray(given))
    np.testing.assert_array_equal(device.read(), host.read())


@pytest.mark.parametrize("at", [0, 1, 3, -1])
def test_one_entry_is_written(stream: Stream, at: int) -> None:
    buffer = filled(stream, 4, 2, 3)
    buffer.write(-values(2, 3), at=at)
    expected = values(4, 2, 3)
    expected[at] = -values(2, 3)
    np.testing.assert_array_equal(buffer.read(), expected)


@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3)])
def test_a_buffer_is_copied_into_an_entry(stream: Stream, shape: tuple[int, ...]) -> None:
    buffer = filled(stream, 4, 2, 3)
    buffer.copy_from(DeviceBuffer(shape, np.float32, stream), at=2)
    expected = values(4, 2, 3)
    expected[2] = 0
    np.testing.assert_array_equal(buffer.read(), expected)


@pytest.mark.parametrize("at", [4, -5])
def test_an_entry_beyond_the_end_overwrites_nothing(stream: Stream, at: int) -> None:
    buffer = filled(stream, 4, 2)
    with pytest.raises(IndexError):
        buffer.write(values(2), at=at)
    with pytest.raises(IndexError):
        buffer.copy_from(filled(stream, 2), at=at)
    np.testing.assert_array_equal(buffer.read(), values(4, 2))


def test_values_of_another_shape_are_refused(stream: Stream) -> None:
    with pytest.raises(ValueError, match="broadcast"):
        filled(stream, 2, 3).write(values(3, 2))


@pytest.mark.parametrize(("shape", "dtype"), [((3,), np.float32), ((2,), np.int64), ((1,), np.int64)])
def test_a_source_that_is_no_entry_is_refused(stream: Stream, shape: tuple[int, ...], dtype: type) -> None:
    with pytest.raises(EngineError, match=r"An entry is float32 \(2,\), was given"):
        filled(stream, 4, 2).copy_from(DeviceBuffer(shape, dtype, stream), at=0)


def test_memory_of_another_device_is_refused(stream: Stream) -> None:
    with pytest.raises(EngineError, match="was given HostBuffer"):
        filled(stream, 4, 2).copy_from(HostBuffer(values(2)), at=0)


def test_memory_is_freed_with_its_buffer() -> None:
    memory = HostMemory()
    buffer = DeviceBuffer((4,), np.float32, host_stream(memory=memory))
    assert list(memory.live) == [buffer.address]
    del buffer
    assert not memory.live


def test_memory_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostMemory, "allocate", lambda *_, **__: 1 / 0)
    with pytest.raises(EngineError, match=r"CUDA gave no 4\.0 MiB: .* fewer --rows"):
        DeviceBuffer((1024, 1024), np.float32, host_stream())


def test_a_failed_copy_is_told() -> None:
    calls = HostRuntime()
    buffer = DeviceBuffer((2,), np.float32, host_stream(calls=calls))
    calls.status = runtime.cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(EngineError, match=r"CUDA error 700, an illegal memory access was encountered\. See nvidia-smi"):
        buffer.write(values(2))


def test_check_hands_on_what_came_with_success() -> None:
    success = runtime.cudaError_t.cudaSuccess
    assert (check((success,)), check((success, 5)), check((success, 5, 6))) == ((), 5, (5, 6))


def test_full_memory_says_what_to_do() -> None:
    with pytest.raises(EngineError, match=r"CUDA error 2, out of memory.* fewer --rows"):
        check((runtime.cudaError_t.cudaErrorMemoryAllocation,))


@pytest.mark.skipif(FOUND.gpu is not None, reason="there is a GPU")
def test_without_a_gpu_the_probe_says_why() -> None:
    assert FOUND.gpu is None
    assert "CUDA error" in FOUND.reason
    with pytest.raises(EngineError, match=r"There is no GPU to work on\. CUDA error"):
        open_stream()


@pytest.mark.gpu
@pytest.mark.skipif(FOUND.gpu is None, reason=FOUND.reason)
def test_with_a_gpu_the_probe_names_it() -> None:
    assert FOUND.gpu is not None
    assert FOUND.gpu.name
    assert not FOUND.reason


def test_without_cuda_python_the_probe_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "runtime", None)
    assert probe() == Probe(None, "cuda-python is not installed: pip install 'latentd[cuda]' or 'latentd[rtx]'.")


def test_whatever_is_raised_becomes_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: (runtime.cudaError_t.cudaSuccess, 1))
    monkeypatch.setattr(core, "Device", lambda _: 1 / 0)
    assert probe() == Probe(None, "division by zero")
