"""A fake GPU, and where there is one a real one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engines.backends.cuda import Cuda, CudaDevice, CudaStream, open_cuda
from tests.engines.backends.cuda.gpus import ON_A_GPU
from tests.engines.backends.fake_cuda import FakeCuda


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    """A fake GPU that nothing may go wrong on."""
    made = FakeCuda()
    yield made
    assert made.faults == []


@pytest.fixture
def device(fake: FakeCuda) -> CudaDevice:
    return CudaDevice(Cuda(fake), name="Fake")


@pytest.fixture(params=["fake", ON_A_GPU])
def any_device(request: pytest.FixtureRequest) -> CudaDevice:
    if request.param == "gpu":
        return CudaDevice(open_cuda()[0], name="GPU")
    made: CudaDevice = request.getfixturevalue("device")
    return made


@pytest.fixture
def stream(any_device: CudaDevice) -> CudaStream:
    return any_device.stream("work")
