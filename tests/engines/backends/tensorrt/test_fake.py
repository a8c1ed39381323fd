"""The fake has the names, refusals and checks of the real package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorrt_rtx

from engines.backends.cuda import Cuda, CudaStream, DeviceBuffer
from engines.backends.tensorrt.engine import Scratch
from engines.backends.tensorrt.log import logger_for
from engines.errors import DeviceLost
from tests.engines.backends import fake_tensorrt as fake
from tests.engines.backends.fake_cuda import FakeCuda
from tests.engines.backends.tensorrt.tiny import WIDTH, Bench, inputs


@pytest.mark.parametrize("name", sorted({*fake.__all__, *fake.RTX_NAMES}))
def test_the_fake_has_only_names_that_are_real(name: str) -> None:
    real = getattr(tensorrt_rtx, name)
    for faked in (getattr(fake, name, None), fake.RTX_NAMES.get(name)):
        if isinstance(faked, type):
            assert public(faked) <= set(dir(real))


def public(kind: type) -> set[str]:
    """What a fake's class, and those that it is made from, have by themselves."""
    own = [one for one in kind.__mro__ if one.__module__ == fake.__name__]
    return {member for one in own for member in vars(one) if not member.startswith("_")}


def test_the_fake_logs_by_the_real_severities() -> None:
    for severity in fake.Severity:
        assert getattr(tensorrt_rtx.ILogger.Severity, severity.name).value == severity.value


@pytest.mark.parametrize("dtype", fake.DataType)
def test_the_fake_knows_types_as_the_real_one_does(dtype: fake.DataType) -> None:
    real = getattr(tensorrt_rtx.DataType, dtype.name)
    if dtype is fake.DataType.BF16:
        for nptype, unknown in ((tensorrt_rtx.nptype, real), (fake.nptype, dtype)):
            with pytest.raises(TypeError, match="equivalent numpy datatype"):
                nptype(unknown)
    else:
        assert np.dtype(tensorrt_rtx.nptype(real)) == np.dtype(fake.nptype(dtype))


def made_context(path: Path, gpu: FakeCuda) -> fake.IExecutionContext:
    Cuda(gpu)
    engine = fake.Runtime(logger_for(fake)).deserialize_cuda_engine(path.read_bytes())
    assert engine is not None
    return engine.create_execution_context(fake.ExecutionContextAllocationStrategy.USER_MANAGED)


def test_the_fake_refuses_what_comes_out_of_order(engine: Path, gpu: FakeCuda) -> None:
    context, stream = made_context(engine, gpu), CudaStream(Cuda(gpu)).handle
    kept = CudaStream(Cuda(gpu))
    stream = kept.handle
    assert not context.set_input_shape("x", (2, WIDTH)), "before the profile"
    assert not context.set_optimization_profile_async(2, stream), "of two"
    assert not context.set_optimization_profile_async(0, 7), "no stream"
    assert context.set_optimization_profile_async(0, stream)
    assert not context.set_input_shape("x", (3, WIDTH)), "outside the profile"
    assert context.set_input_shape("x", (2, WIDTH))
    assert context.infer_shapes() == ["row", "table"]
    assert not context.set_tensor_address("x", 0)
    assert not context.set_tensor_address("x", 8)
    assert not context.set_tensor_address("z", 256)
    assert not context.execute_async_v3(stream), "without shapes, addresses and memory"


def faults(bench: Bench, gpu: FakeCuda) -> list[str]:
    """The faults so far, which are then forgotten."""
    with pytest.raises(DeviceLost):
        bench.stream.record().wait()
    found, gpu.faults = gpu.faults, []
    return found


def test_the_fake_notices_scratch_that_two_streams_share(bench: Bench, gpu: FakeCuda) -> None:
    other = bench.device.stream("pictures")
    bench.device._scratch[other] = bench.device._scratch.setdefault(bench.stream, Scratch(bench.device._cuda))
    calls = [bench.bind(inputs(2))[1], replace(bench, stream=other).bind(inputs(2))[1]]
    for call in calls:
        call.launch()
    assert "is given to stream" in faults(bench, gpu)[0]


def test_the_fake_notices_a_context_on_two_streams(bench: Bench, gpu: FakeCuda) -> None:
    _buffers, call = bench.bind(inputs(2))
    call.launch()
    call._stream = bench.device.stream("pictures")
    call._ran = False
    call.launch()
    assert "one context runs on two streams" in faults(bench, gpu)


def test_the_fake_notices_that_a_captured_context_is_changed(bench: Bench, gpu: FakeCuda) -> None:
    _buffers, call = bench.bind(inputs(2))
    for _ in range(2):
        call.launch()
    call._context.set_input_shape("x", (1, WIDTH))
    assert "which its captured graph does not notice" in faults(bench, gpu)[0]


def test_the_fake_notices_memory_that_went_before_its_call(bench: Bench, gpu: FakeCuda) -> None:
    buffers, call = bench.bind(inputs(2))
    output = buffers["y"]
    assert isinstance(output, DeviceBuffer)
    bench.stream.record().wait()
    gpu.give_back(output.address)
    call.launch()
    assert "are not in allocated device memory" in faults(bench, gpu)[0]
    buffers.clear()  # the fake was given its memory back already
    del output, call
    gpu.faults.clear()
