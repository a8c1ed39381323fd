"""Numbers of .safetensors files that NumPy lacks, and those that it has, as FP32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Buffer = bytes | bytearray | memoryview
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}


def to_float32(dtype: str, data: Buffer) -> NDArray[np.float32]:
    """Numbers of a `dtype` of `DTYPES`, little-endian, rounded to FP32: one dimension. Too large ones become infinite.

    Raises:
        KeyError: the dtype is another.
    """
    with np.errstate(over="ignore"):
        return DTYPES[dtype](data)


def _bfloat16(data: Buffer) -> NDArray[np.float32]:
    """The upper half of an FP32."""
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


def _float8_e5m2(data: Buffer) -> NDArray[np.float32]:
    """The upper half of an FP16."""
    return (np.frombuffer(data, np.uint8).astype(np.uint16) << 8).view(np.float16).astype(np.float32)


def _float8_e4m3(data: Buffer) -> NDArray[np.float32]:
    """Micikevicius et al. (2022), FP8 formats for deep learning, table 1: no infinities, and NaN with every bit set."""
    bits = np.arange(128)
    exponent, mantissa = bits >> 3, bits & 7
    values = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)[np.frombuffer(data, np.uint8)]


def _of_numpy(dtype: str) -> Callable[[Buffer], NDArray[np.float32]]:
    return lambda data: np.frombuffer(data, dtype).astype(np.float32)


DTYPES: Mapping[str, Callable[[Buffer], NDArray[np.float32]]] = {
    **{name: _of_numpy(dtype) for name, dtype in _NUMPY.items()},
    "BF16": _bfloat16,
    "F8_E5M2": _float8_e5m2,
    "F8_E4M3": _float8_e4m3,
}
