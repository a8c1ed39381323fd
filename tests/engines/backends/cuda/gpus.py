"""GPUs, fake and real, and arrays on them."""

from __future__ import annotations

import numpy as np
import pytest

from engines.backends.cuda import CudaDevice, CudaStream, DeviceBuffer, probe
from engines.contract import Array

FOUND = probe()


ON_A_GPU = pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(FOUND.gpu is None, reason=FOUND.reason)])


MIB = 2**20


def values(*shape: int) -> Array:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def filled(device: CudaDevice, stream: CudaStream, *shape: int) -> DeviceBuffer:
    buffer = device.allocate(shape, np.float32)
    stream.write(buffer, values(*shape))
    return buffer


def read(stream: CudaStream, buffer: DeviceBuffer, *, at: int | None = None) -> Array:
    return stream.read(buffer, at=at).result()


class Elsewhere:
    """A buffer, an event and a stream of another device."""

    shape = (2,)
