"""Launches: the first kernel by kernel, the second captured, later ones as a CUDA graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.backends.tensorrt.engine import TensorRtCall
from engines.backends.tensorrt.log import logger_for
from engines.errors import DeviceLost, EngineError
from tests.engines.backends import fake_tensorrt as fake
from tests.engines.backends.fake_cuda import ByPriority, FakeCuda
from tests.engines.backends.fake_tensorrt import fake_device, write_engine
from tests.engines.backends.tensorrt.tiny import PROFILES, Bench, inputs


def launches(gpu: FakeCuda, call: TensorRtCall, times: int) -> list[tuple[int, int]]:
    """How many captures were begun, and how many graphs launched, after each launch."""
    counts = []
    for _ in range(times):
        call.launch()
        counts.append((gpu.calls["cudaStreamBeginCapture"], gpu.calls["cudaGraphLaunch"]))
    return counts


@pytest.mark.parametrize("for_rtx", [False, True])
def test_the_second_launch_is_captured_and_all_later_ones_are_its_graph(
    bench: Bench, rtx_bench: Bench, gpu: FakeCuda, for_rtx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueued = []
    real = fake.IExecutionContext.execute_async_v3

    def spy(context: fake.IExecutionContext, handle: int) -> bool:
        enqueued.append(handle)
        return real(context, handle)

    monkeypatch.setattr(fake.IExecutionContext, "execute_async_v3", spy)
    _buffers, call = (rtx_bench if for_rtx else bench).bind(inputs(2))
    assert launches(gpu, call, 4) == [(0, 0), (1, 1), (1, 2), (1, 3)]
    assert len(enqueued) == 2


@pytest.mark.parametrize("for_rtx", [False, True])
def test_an_engine_that_cannot_be_captured_runs_without_graphs_after_one_warning(
    tiny: Path, engine: Path, gpu: FakeCuda, for_rtx: bool, caplog: pytest.LogCaptureFixture
) -> None:
    write_engine(engine, tiny, PROFILES, capturable=0)
    device = fake_device(gpu, for_rtx=for_rtx)
    bench = Bench(device, device.stream("steps"), engine, tiny)
    buffers, call = bench.bind(inputs(2))
    counts = launches(gpu, call, 4)
    assert counts == [(0, 0)] * 4 if for_rtx else [(0, 0), (1, 0), (2, 0), (2, 0)]
    assert device.uncaptured() == {"tiny": 1}
    np.testing.assert_array_equal(bench.read(buffers["y"]), bench.expected(inputs(2)))
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1
    assert said[0].startswith("tiny.engine runs without a CUDA graph, which makes it slower, for x [2, ")
    assert ": TensorRT " in said[0]


@pytest.mark.parametrize(
    ("function", "status"),
    [
        ("cudaStreamBeginCapture", "cudaErrorIllegalState"),
        ("cudaStreamEndCapture", "cudaErrorStreamCaptureInvalidated"),
        ("cudaGraphInstantiate", "cudaErrorMemoryAllocation"),
    ],
)
@pytest.mark.parametrize("times", [1, 2])
def test_a_capture_that_fails_is_tried_once_more_and_costs_only_its_call_the_graph(
    bench: Bench, gpu: FakeCuda, function: str, status: str, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine = bench.device.load(bench.engine, bench.stream)
    buffers, _call = bench.bind(inputs(2))
    call, other = engine.bind(buffers), engine.bind(buffers)
    call.launch()
    real = gpu.cudaStreamEndCapture
    for seed in range(1, times + 1):
        given = inputs(2, seed=seed)
        bench.write(buffers, given)
        if function == "cudaStreamEndCapture":  # planted, it would leave the stream capturing
            gpu.cudaStreamEndCapture = spoilt(gpu)  # type: ignore[method-assign]
        else:
            gpu.fail(function, status)
        call.launch()
        gpu.cudaStreamEndCapture = real  # type: ignore[method-assign]
        np.testing.assert_array_equal(bench.read(buffers["y"]), bench.expected(given))
        assert (gpu.graphs, gpu.calls["cudaGraphLaunch"]) == (0, 0)
    for _ in range(2):
        call.launch()
    lost = times == 2
    assert (gpu.graphs, gpu.calls["cudaGraphLaunch"]) == ((0, 0) if lost else (1, 2))
    assert caplog.text.count("runs without a CUDA graph") == lost
    assert bench.device.uncaptured() == {"tiny": lost}
    for _ in range(2):
        other.launch()
    assert gpu.graphs == 2 - lost, "another call of the engine has its graph"


def spoilt(gpu: FakeCuda) -> Any:
    real = gpu.cudaStreamEndCapture

    def end(stream: int) -> Any:
        capture = gpu._streams[stream].capture
        assert capture is not None
        capture.broken = True
        return real(stream)

    return end


def test_streams_that_tensorrt_adds_are_part_of_the_graph(tiny: Path, bench: Bench, gpu: FakeCuda) -> None:
    write_engine(bench.engine, tiny, PROFILES, aux_streams=1)
    buffers, call = bench.bind(inputs(2))
    for seed in range(4):
        given = inputs(2, seed=seed)
        bench.write(buffers, given)
        call.launch()
        np.testing.assert_array_equal(bench.read(buffers["y"]), bench.expected(given))
    assert gpu.calls["cudaGraphLaunch"] == 3


def test_a_refused_step_is_an_error_with_what_tensorrt_logged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _buffers, call = bench.bind(inputs(2))
    real = fake.IExecutionContext.execute_async_v3
    monkeypatch.setattr(
        fake.IExecutionContext, "execute_async_v3", lambda self, _: self._refuse("Myelin ran out of luck")
    )
    with pytest.raises(EngineError, match=r"TensorRT failed to run a step\. Myelin ran out of luck") as raised:
        call.launch()
    assert not isinstance(raised.value, DeviceLost)
    monkeypatch.setattr(fake.IExecutionContext, "execute_async_v3", real)
    call.launch()


def test_a_refused_graph_is_an_error(bench: Bench, gpu: FakeCuda) -> None:
    _buffers, call = bench.bind(inputs(2))
    launches(gpu, call, 2)
    gpu.fail("cudaGraphLaunch", "cudaErrorLaunchOutOfResources")
    with pytest.raises(EngineError, match="CUDA error 701"):
        call.launch()
    call.launch()


def test_a_context_lives_until_its_work_is_done(tiny: Path, engine: Path) -> None:
    """TensorRT needs it; and here nothing is done before the host waits."""
    write_engine(engine, tiny, PROFILES)
    device = fake_device(FakeCuda(schedule=ByPriority()))
    bench = Bench(device, device.stream("steps"), engine, tiny)
    _buffers, call = bench.bind(inputs(2))
    call.launch()
    event = bench.stream.record()
    assert not event.done()
    del call
    assert event.done()


@pytest.mark.parametrize("launched", [0, 1, 2])
def test_every_kind_of_launch_reports_a_lost_device(bench: Bench, gpu: FakeCuda, launched: int) -> None:
    _buffers, call = bench.bind(inputs(2))
    launches(gpu, call, launched)
    bench.stream.record().wait()
    gpu.lose("cudaErrorLaunchFailure")
    if launched == 0:  # TensorRT enqueues without an error, and the stream reports it
        call.launch()
        with pytest.raises(DeviceLost):
            bench.stream.record()
    else:
        with pytest.raises(DeviceLost, match="CUDA error 719"):
            call.launch()


def test_a_refusal_on_a_lost_device_is_reported_as_a_lost_device(
    bench: Bench, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    _buffers, call = bench.bind(inputs(2))
    monkeypatch.setattr(fake.IExecutionContext, "execute_async_v3", lambda *_: False)
    gpu.lose("cudaErrorIllegalAddress")
    with pytest.raises(DeviceLost, match="CUDA error 700"):
        call.launch()


def test_errors_logged_before_a_success_are_not_part_of_later_messages(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    _buffers, call = bench.bind(inputs(2))
    logger_for(fake).log(fake.ILogger.ERROR, "an old trouble")
    call.launch()
    monkeypatch.setattr(fake.IExecutionContext, "execute_async_v3", lambda *_: False)
    _buffers, call = bench.bind(inputs(2))
    with pytest.raises(EngineError, match=r"^TensorRT failed to run a step\.$"):
        call.launch()
