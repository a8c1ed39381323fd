"""Buffers on the GPU: contents, entries and views."""

from __future__ import annotations

import numpy as np
import pytest

from engines.backends.cuda import CudaDevice, CudaStream, as_cuda_stream
from engines.backends.device import ALIGNMENT
from engines.contract import Array
from engines.errors import EngineError
from tests.engines.backends.cuda.gpus import Elsewhere, filled, read, values


def test_a_buffer_is_zero_when_made(any_device: CudaDevice, stream: CudaStream) -> None:
    buffer = any_device.allocate((3, 5), np.int64)
    np.testing.assert_array_equal(read(stream, buffer), np.zeros((3, 5), np.int64))
    assert (buffer.shape, buffer.dtype, buffer.nbytes) == ((3, 5), np.dtype(np.int64), 120)
    assert buffer.address % ALIGNMENT == 0


def test_what_was_written_is_read(any_device: CudaDevice, stream: CudaStream) -> None:
    buffer = filled(any_device, stream, 2, 3)
    np.testing.assert_array_equal(read(stream, buffer), values(2, 3))
    np.testing.assert_array_equal(read(stream, buffer, at=-1), values(2, 3)[-1])


@pytest.mark.parametrize(
    "given", [values(3, 2).T, values(2, 3).astype(np.float64), np.float32(4), values(1, 2, 3)], ids=str
)
def test_what_is_laid_out_otherwise_is_written_as_numpy_copies_it(
    any_device: CudaDevice, stream: CudaStream, given: Array
) -> None:
    buffer, expected = any_device.allocate((2, 3), np.float32), np.zeros((2, 3), np.float32)
    stream.write(buffer, np.asarray(given))
    np.copyto(expected, given)
    np.testing.assert_array_equal(read(stream, buffer), expected)


@pytest.mark.parametrize("at", [0, 1, 3, -1])
def test_one_entry_is_written(any_device: CudaDevice, stream: CudaStream, at: int) -> None:
    buffer = filled(any_device, stream, 4, 2, 3)
    stream.write(buffer, -values(2, 3), at=at)
    expected = values(4, 2, 3)
    expected[at] = -values(2, 3)
    np.testing.assert_array_equal(read(stream, buffer), expected)


@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3)])
def test_a_buffer_is_copied_into_an_entry(any_device: CudaDevice, stream: CudaStream, shape: tuple[int, ...]) -> None:
    buffer = filled(any_device, stream, 4, 2, 3)
    stream.copy(any_device.allocate(shape, np.float32), buffer, at=2)
    expected = values(4, 2, 3)
    expected[2] = 0
    np.testing.assert_array_equal(read(stream, buffer), expected)


def test_an_entry_is_copied_into_another_and_a_whole_into_a_whole(any_device: CudaDevice, stream: CudaStream) -> None:
    source, to = filled(any_device, stream, 4, 2), any_device.allocate((3, 2), np.float32)
    stream.copy(source, to, source_at=3, at=1)
    np.testing.assert_array_equal(read(stream, to), [[0, 0], [6, 7], [0, 0]])
    whole = any_device.allocate((2, 4), np.float32)
    stream.copy(source, whole)
    np.testing.assert_array_equal(read(stream, whole), values(2, 4))


def test_a_view_is_part_of_the_same_memory(any_device: CudaDevice, stream: CudaStream) -> None:
    whole = any_device.allocate((3 * ALIGNMENT,), np.uint8)
    part = whole.view((2, 4), np.int64, offset=2 * ALIGNMENT)
    first = whole.view((ALIGNMENT,), np.int8, offset=ALIGNMENT).view((4,), np.int8, offset=0)
    stream.write(part, values(2, 4).astype(np.int64))
    stream.write(first, np.full(4, -1, np.int8))
    everything = read(stream, whole)
    np.testing.assert_array_equal(everything[2 * ALIGNMENT :][:64].view(np.int64), range(8))
    assert list(everything[ALIGNMENT - 1 :][:6]) == [0, 255, 255, 255, 255, 0]
    del whole
    np.testing.assert_array_equal(read(stream, part, at=1), [4, 5, 6, 7])


@pytest.mark.parametrize(("shape", "offset"), [((1,), 8), ((1,), -ALIGNMENT), ((65,), 0), ((1,), ALIGNMENT)])
def test_a_view_that_is_not_inside_is_refused(any_device: CudaDevice, shape: tuple[int, ...], offset: int) -> None:
    with pytest.raises(ValueError, match=rf"bytes at offset {offset} does not fit into 256 bytes at a multiple of 256"):
        any_device.allocate((64,), np.float32).view(shape, np.float32, offset=offset)


@pytest.mark.parametrize("at", [4, -5])
def test_an_entry_beyond_the_end_overwrites_nothing(any_device: CudaDevice, stream: CudaStream, at: int) -> None:
    buffer, row = filled(any_device, stream, 4, 2), any_device.allocate((2,), np.float32)
    with pytest.raises(IndexError):
        stream.write(buffer, values(2), at=at)
    with pytest.raises(IndexError):
        stream.copy(row, buffer, at=at)
    with pytest.raises(IndexError):
        stream.copy(buffer, row, source_at=at)
    with pytest.raises(IndexError):
        stream.read(buffer, at=at)
    np.testing.assert_array_equal(read(stream, buffer), values(4, 2))


def test_values_of_another_shape_are_refused(any_device: CudaDevice, stream: CudaStream) -> None:
    buffer = filled(any_device, stream, 2, 3)
    with pytest.raises(ValueError, match="broadcast"):
        stream.write(buffer, values(3, 2))
    np.testing.assert_array_equal(read(stream, buffer), values(2, 3))


@pytest.mark.parametrize(("shape", "dtype"), [((3,), np.float32), ((2,), np.int64), ((1,), np.int64)])
def test_a_source_that_is_no_entry_is_refused(
    any_device: CudaDevice, stream: CudaStream, shape: tuple[int, ...], dtype: type
) -> None:
    with pytest.raises(EngineError, match=r"A copy goes to float32 \(2,\), was given"):
        stream.copy(any_device.allocate(shape, dtype), filled(any_device, stream, 4, 2), at=0)


def test_what_is_of_another_device_is_refused(any_device: CudaDevice, stream: CudaStream) -> None:
    foreign, own = Elsewhere(), any_device.allocate((2,), np.float32)
    for given in (
        lambda: stream.copy(foreign, own),  # type: ignore[arg-type]
        lambda: stream.copy(own, foreign),  # type: ignore[arg-type]
        lambda: stream.write(foreign, values(2)),  # type: ignore[arg-type]
        lambda: stream.read(foreign),  # type: ignore[arg-type]
        lambda: stream.follow(foreign),  # type: ignore[arg-type]
        lambda: stream.record().seconds_since(foreign),  # type: ignore[arg-type]
        lambda: as_cuda_stream(foreign),
    ):
        with pytest.raises(EngineError, match="was given Elsewhere"):
            given()
