"""Profiling: a Chrome trace of a minute of work, and NVTX ranges for NVIDIA's profilers."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.backends.device import Event, Stream
from engines.errors import DeviceLost

try:
    import nvtx
except ImportError:  # comes with the extra `cuda`; ranges cost next to nothing where no profiler listens
    nvtx = None

_log = logging.getLogger(__name__)
_HOST = "executor"
_NOTHING = nullcontext()


@dataclass(frozen=True, slots=True)
class _Mark:
    """A piece of the device's work between two events."""

    track: str
    name: str
    begin: Event
    end: Event


@dataclass(slots=True)
class _TraceRecording:
    """Everything recorded so far. Times are seconds since it began."""

    path: Path
    base: Event
    began: float
    seconds: float
    spans: list[tuple[str, str, float, float]] = field(default_factory=list)  # track, name, begin, end
    marks: list[_Mark] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return time.perf_counter() - self.began > self.seconds

    @contextmanager
    def mark(self, name: str, stream: Stream, track: str) -> Iterator[None]:
        """Time on the device what the body queues on `stream`."""
        begin = stream.record(timed=True)
        yield
        self.marks.append(_Mark(track, name, begin, stream.record(timed=True)))

    def collect(self) -> None:
        """Read the times of the marks that the device has passed."""
        passed = [mark for mark in self.marks if mark.end.done()]
        self.marks = [mark for mark in self.marks if mark not in passed]
        self.spans += [
            (mark.track, mark.name, mark.begin.seconds_since(self.base), mark.end.seconds_since(self.base))
            for mark in passed
        ]


@dataclass(slots=True)
class _Span:
    """A context manager as a class, not a generator: several are made for every step."""

    trace: Trace
    name: str
    begin: float = 0.0

    def __enter__(self) -> None:
        self.begin = time.perf_counter()
        if nvtx:
            nvtx.push_range(self.name)

    def __exit__(self, *_: object) -> None:
        if nvtx:
            nvtx.pop_range()
        self.trace.add_span(self.name, self.begin)


class Trace:
    """Spans of the executor's thread, and of the device's streams. For the executor's thread."""

    def __init__(self, path: Path | None = None, *, seconds: float = 60.0) -> None:
        """Record `seconds` of work from `start` on, and write them to `path`; without a path, record nothing."""
        self._path = path
        self._seconds = seconds
        self._recording: _TraceRecording | None = None
        self.began = 0.0  # on perf_counter's clock: the origin of what is written

    def start(self, stream: Stream) -> None:
        """Begin recording, while the device is idle. Does nothing without a path."""
        if self._path:
            base = stream.record(timed=True)
            base.wait()
            self.began = time.perf_counter()
            self._recording = _TraceRecording(self._path, base, self.began, self._seconds)

    def span(self, name: str) -> AbstractContextManager[None]:
        """A span of the executor's thread: the time of the body."""
        return _Span(self, name)

    def add_span(self, name: str, begin: float) -> None:
        """Add a span of the executor's thread from `begin`, on perf_counter's clock, until now."""
        if self._recording:
            began = self._recording.began
            self._recording.spans.append((_HOST, name, begin - began, time.perf_counter() - began))

    def device(self, name: str, stream: Stream, *, track: str) -> AbstractContextManager[None]:
        """A span of the device: the time of what the body queues on `stream`."""
        return self._recording.mark(name, stream, track) if self._recording else _NOTHING

    def collect(self) -> None:
        """Read the marks that the device has passed; write the file when the time is over."""
        if self._recording:
            self._recording.collect()
            if self._recording.over:
                recording, self._recording = self._recording, None
                # In a thread: writing megabytes must not delay a step.
                threading.Thread(target=_write, args=(recording.path, recording.spans), name="trace").start()

    def close(self) -> None:
        """Write what was recorded, if the time was not over."""
        if self._recording:
            with suppress(DeviceLost):  # marks passed before that are written all the same
                self._recording.collect()
            _write(self._recording.path, self._recording.spans)
            self._recording = None


def _write(path: Path, spans: list[tuple[str, str, float, float]]) -> None:
    tracks = sorted({track for track, *_ in spans}, key=lambda track: (track != _HOST, track))
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": index, "name": "thread_name", "args": {"name": track}}
        for index, track in enumerate(tracks)
    ]
    events += [
        {"ph": "X", "pid": 1, "tid": tracks.index(track), "name": name, "ts": begin * 1e6, "dur": (end - begin) * 1e6}
        for track, name, begin, end in spans
    ]
    try:
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
    except OSError as error:
        _log.error("the trace cannot be written: %s", error)
    else:
        _log.info("wrote %d spans to %s: open it in https://ui.perfetto.dev", len(spans), path)
