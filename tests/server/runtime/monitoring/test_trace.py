"""What is written of a minute's work."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.spans import TraceSpan, read_trace
from engines.backends import host
from engines.backends.host import HostDevice, HostEvent
from engines.backends.onnxruntime import OnnxRuntimeDevice
from engines.errors import DeviceLost
from server.runtime.monitoring import trace as trace_module
from server.runtime.monitoring.trace import Trace


@pytest.fixture
def device() -> HostDevice:
    return OnnxRuntimeDevice(threads=1)


def spans(path: Path) -> list[tuple[str, str]]:
    """Lane and name of each, in the order they began."""
    found = read_trace(path)
    assert all(span.end >= span.begin for span in found)
    return [(span.track, span.name) for span in found]


def work(trace: Trace, device: HostDevice) -> None:
    stream = device.stream("steps")
    with trace.span("launch"), trace.device("step", stream, track="steps"):
        pass
    trace.collect()


def test_spans_of_host_and_device_lie_on_one_clock(
    tmp_path: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which every reading is a second after the last, on the host and on the device."""
    clock = itertools.count().__next__
    monkeypatch.setattr(trace_module, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(host, "perf_counter", clock)
    trace = Trace(tmp_path / "trace.json")
    trace.start(device.stream("steps"))  # the device's origin is at 0, the host's at 1: as far apart as two readings
    work(trace, device)  # from 2 to 5, and at 6 the trace is not over
    work(trace, device)
    trace.close()
    first = [TraceSpan("executor", "launch", 1, 4), TraceSpan("steps", "step", 3, 4)]
    later = [TraceSpan(one.track, one.name, one.begin + 5, one.end + 5) for one in first]
    assert read_trace(tmp_path / "trace.json") == (*first, *later)


def test_after_its_time_it_is_written_and_no_more_is_recorded(tmp_path: Path, device: HostDevice) -> None:
    trace = Trace(tmp_path / "trace.json", seconds=0)
    trace.start(device.stream("steps"))
    work(trace, device)
    for thread in threading.enumerate():
        if thread.name == "trace":
            thread.join()
    work(trace, device)
    trace.close()
    assert spans(tmp_path / "trace.json") == [("executor", "launch"), ("steps", "step")]


def test_without_a_path_nothing_is_recorded(
    tmp_path: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trace = Trace()
    trace.start(device.stream("steps"))
    work(trace, device)
    trace.close()
    assert trace.began == 0
    assert not list(tmp_path.iterdir())


def test_on_a_device_that_is_lost_what_was_known_is_written(
    tmp_path: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = Trace(tmp_path / "trace.json")
    trace.start(device.stream("steps"))
    work(trace, device)
    with trace.device("the last", device.stream("steps"), track="steps"):
        pass

    def lost(_event: HostEvent) -> bool:
        raise DeviceLost("gone")

    monkeypatch.setattr(HostEvent, "done", lost)
    trace.close()
    assert spans(tmp_path / "trace.json") == [("executor", "launch"), ("steps", "step")]


def test_a_folder_that_cannot_be_written_is_a_line_of_log(
    tmp_path: Path, device: HostDevice, caplog: pytest.LogCaptureFixture
) -> None:
    trace = Trace(tmp_path / "missing" / "trace.json")
    trace.start(device.stream("steps"))
    trace.close()
    assert "the trace cannot be written" in caplog.text
