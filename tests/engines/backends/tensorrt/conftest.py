"""Devices over the fakes, and on a GPU over the real TensorRT, with an engine of the small graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.backends.tensorrt import device as tensorrt
from engines.backends.tensorrt import rtx
from tests.engines.backends.fake_cuda import FakeCuda
from tests.engines.backends.fake_tensorrt import fake_device, write_engine
from tests.engines.backends.tensorrt.tiny import PROFILES, Bench, compile_apart, on_a_gpu, write_onnx


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("tiny") / "tiny.onnx")


@pytest.fixture(scope="module")
def rtx_engine(tiny: Path) -> Path:
    """A real engine of TensorRT for RTX, which builds without a GPU."""
    return compile_apart("tensorrt_rtx", tiny, tiny.with_name("tiny.rtx"))


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    """A fake GPU that nothing may go wrong on."""
    made = FakeCuda()
    yield made
    assert made.faults == []


@pytest.fixture
def engine(tiny: Path, tmp_path: Path) -> Path:
    return write_engine(tmp_path / "tiny.engine", tiny, PROFILES)


@pytest.fixture
def bench(tiny: Path, engine: Path, gpu: FakeCuda) -> Bench:
    """The fake's."""
    device = fake_device(gpu)
    return Bench(device, device.stream("steps"), engine, tiny)


@pytest.fixture
def rtx_bench(tiny: Path, engine: Path, gpu: FakeCuda) -> Bench:
    """The fake's of TensorRT for RTX."""
    device = fake_device(gpu, for_rtx=True)
    return Bench(device, device.stream("steps"), engine, tiny)


@pytest.fixture(params=["fake", "fake rtx", on_a_gpu("tensorrt_rtx"), on_a_gpu("tensorrt")])
def any_bench(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Bench:
    """The fakes', and on a GPU the real ones'."""
    if request.param.startswith("fake"):
        made: Bench = request.getfixturevalue("bench" if request.param == "fake" else "rtx_bench")
        return made
    device = (rtx if request.param == "tensorrt_rtx" else tensorrt).open_device(threads=0)
    return Bench(device, device.stream("steps"), compile_apart(request.param, tiny, tmp_path / "tiny.engine"), tiny)
