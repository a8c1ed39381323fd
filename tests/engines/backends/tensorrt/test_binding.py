"""Scratch memory, buffers that do not fit the engine, and what TensorRT refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.backends.tensorrt.log import logger_for
from engines.errors import EngineError
from tests.engines.backends import fake_tensorrt as fake
from tests.engines.backends.fake_cuda import FakeCuda
from tests.engines.backends.fake_tensorrt import fake_device, write_engine
from tests.engines.backends.tensorrt.tiny import PROFILES, WIDTH, Bench, Elsewhere, inputs


def test_two_streams_have_scratch_of_their_own(bench: Bench, gpu: FakeCuda) -> None:
    other = replace(bench, stream=bench.device.stream("pictures"))
    (buffers, steps), (others, pictures) = bench.bind(inputs(2)), other.bind(inputs(3))
    assert bench.device.memory()["scratch"] == 2 * fake.SCRATCH
    with gpu.gate(bench.stream.handle):
        for _ in range(3):
            steps.launch()
            pictures.launch()
        np.testing.assert_array_equal(other.read(others["y"]), bench.expected(inputs(3)))
    np.testing.assert_array_equal(bench.read(buffers["y"]), bench.expected(inputs(2)))


def test_the_scratch_of_a_stream_is_that_of_its_largest_engine(tiny: Path, bench: Bench) -> None:
    large = write_engine(bench.engine.with_name("large.engine"), tiny, PROFILES, scratch=3 * fake.SCRATCH)
    bench.device.load(large, bench.stream)
    bound = [bench.bind(inputs(2)), replace(bench, engine=large).bind(inputs(2))]
    assert bench.device.memory()["scratch"] == 3 * fake.SCRATCH
    assert len(bound) == 2


def test_a_larger_engine_that_comes_later_leaves_the_earlier_calls_theirs(tiny: Path, bench: Bench) -> None:
    buffers, small = bench.bind(inputs(2))
    write_engine(bench.engine, tiny, PROFILES, scratch=3 * fake.SCRATCH)
    others, large = bench.bind(inputs(3))
    assert bench.device.memory()["scratch"] == 4 * fake.SCRATCH
    for _ in range(3):
        small.launch()
        large.launch()
    np.testing.assert_array_equal(bench.read(buffers["y"]), bench.expected(inputs(2)))
    np.testing.assert_array_equal(bench.read(others["y"]), bench.expected(inputs(3)))
    del small
    assert bench.device.memory()["scratch"] == 3 * fake.SCRATCH


def test_a_shape_without_a_profile_is_refused_with_the_profiles(any_bench: Bench) -> None:
    expected = (
        "tiny.engine has no profile for x (5, 4), row (5,). It was built for "
        "x (1, 4) to (2, 4), row (1,) to (2,); x (1, 4) to (4, 4), row (1,) to (4,). "
        "Request a supported shape, or rebuild with other --rows or --resolution."
    )
    with pytest.raises(EngineError, match=re.escape(expected)):
        any_bench.bind(inputs(5))


def test_shapes_of_another_rank_are_refused(bench: Bench) -> None:
    with pytest.raises(EngineError, match=r"no profile for row \(2, 1\)\."):
        bench.bind({**inputs(2), "row": np.zeros((2, 1), np.int64)})


def test_another_dtype_is_refused(any_bench: Bench) -> None:
    with pytest.raises(EngineError, match=r"tiny\.engine takes row as int64, was given int32"):
        any_bench.bind({**inputs(2), "row": np.zeros(2, np.int32)})


@pytest.mark.parametrize("change", ["more", "fewer"])
def test_names_that_are_not_the_graphs_are_refused(bench: Bench, change: str) -> None:
    given = inputs(2) | {"z": np.zeros(1)} if change == "more" else {"x": inputs(2)["x"]}
    with pytest.raises(EngineError, match=r"takes \['row', 'table', 'x', 'y'\], was given \['"):
        bench.bind(given)


def test_what_is_of_another_device_is_refused(bench: Bench) -> None:
    foreign: Any = Elsewhere()
    with pytest.raises(EngineError, match="works on GPU memory, was given Elsewhere"):
        bench.device.load(bench.engine, bench.stream).bind(dict.fromkeys(("x", "row", "table", "y"), foreign))
    with pytest.raises(EngineError, match="works on CUDA streams, was given Elsewhere"):
        bench.device.load(bench.engine, foreign)


def test_an_output_of_another_shape_is_not_written_past_its_end(any_bench: Bench) -> None:
    buffers, _call = any_bench.bind(inputs(2))
    buffers["y"] = any_bench.device.allocate((1, WIDTH), np.float32)
    with pytest.raises(EngineError, match=r"computes y as \(2, 4\), was given \(1, 4\)"):
        any_bench.device.load(any_bench.engine, any_bench.stream).bind(buffers)


def test_inputs_that_cannot_be_combined_are_refused(bench: Bench) -> None:
    with pytest.raises(EngineError, match=r"tiny\.engine cannot combine these input shapes: dimensions"):
        bench.bind({**inputs(2), "row": np.zeros(1, np.int64)})


def test_a_dtype_that_numpy_lacks_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake.ICudaEngine, "get_tensor_dtype", lambda *_: fake.DataType.BF16)
    with pytest.raises(EngineError, match=r"tiny\.engine: x is DataType\.BF16, which numpy does not support"):
        bench.device.load(bench.engine, bench.stream)


def test_an_engine_that_does_not_fit_reports_what_uses_the_memory(engine: Path) -> None:
    device = fake_device(FakeCuda(total=8192))
    stream = device.stream("steps")
    held = device.allocate((8000,), np.uint8, purpose="state")
    with pytest.raises(EngineError, match=r"does not fit into the GPU's memory: .*uses state 0\.0 MiB; .*--rows"):
        device.load(engine, stream)
    del held
    device.load(engine, stream)


REFUSALS = {
    "create_execution_context": (None, "create an execution context"),
    "set_optimization_profile_async": (False, "select profile 0"),
    "set_input_shape": (False, "set the shape of x"),
    "infer_shapes": (["x"], r"infer the shapes of \['x'\]"),
    "set_tensor_address": (False, "set the address of x"),
}


@pytest.mark.parametrize("method", REFUSALS)
def test_each_refusal_in_binding_is_an_error(bench: Bench, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, text = REFUSALS[method]
    owner = fake.ICudaEngine if method == "create_execution_context" else fake.IExecutionContext
    monkeypatch.setattr(owner, method, lambda *_: answer)
    with pytest.raises(EngineError, match=f"TensorRT failed to {text}"):
        bench.bind(inputs(2))


def test_warnings_and_errors_reach_the_log(caplog: pytest.LogCaptureFixture) -> None:
    log = logger_for(fake)
    log.take()
    for severity, text in enumerate(["internal", "error", "warning", "info", "verbose"]):
        log.log(fake.Severity(severity), text)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("ERROR", "internal"),
        ("ERROR", "error"),
        ("WARNING", "warning"),
    ]
    assert log.take() == "internal error"


def test_a_corrupted_file_is_not_loaded(any_bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "broken.engine").write_bytes(b"not an engine")
    with pytest.raises(EngineError, match=r"failed to load .*broken\.engine: rebuild it .*\. \S+"):
        any_bench.device.load(tmp_path / "broken.engine", any_bench.stream)


def test_a_missing_file_is_refused(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"none\.engine cannot be read"):
        bench.device.load(tmp_path / "none.engine", bench.stream)


def test_a_runtime_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_logger: fake.ILogger) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(fake, "Runtime", refuse)
    with pytest.raises(EngineError, match="TensorRT does not start: pybind11"):
        fake_device()


def test_a_device_names_its_gpu_and_version(bench: Bench, rtx_bench: Bench) -> None:
    assert bench.device.name == "Fake, TensorRT 11.4.0.106"
    assert rtx_bench.device.name == "Fake, TensorRT for RTX 1.7.1.116"
    assert bench.device.pads
