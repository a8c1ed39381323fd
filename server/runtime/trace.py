"""Where the time goes: a Chrome trace of a minute of work, and NVTX ranges for NVIDIA's profilers."""

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

    lane: str
    name: str
    begin: Event
    end: Event


@dataclass(slots=True)
class _Recording:
    """What is told so far. Times are seconds since it began."""

    path: Path
    base: Event
    began: float
    seconds: float
    spans: list[tuple[str, str, float, float]] = field(default_factory=list)  # lane, name, begin, end
    marks: list[_Mark] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return time.perf_counter() - self.began > self.seconds

    @contextmanager
    def mark(self, name: str, stream: Stream, lane: str) -> Iterator[None]:
        """Have `stream` tell when it begins and ends what the body gives to it."""
        begin = stream.record(timed=True)
        yield
        self.marks.append(_Mark(lane, name, begin, stream.record(timed=True)))

    def collect(self) -> None:
        """Read the times of what the device has done."""
        passed = [mark for mark in self.marks if mark.end.done()]
        self.marks = [mark for mark in self.marks if mark not in passed]
        self.spans += [
            (mark.lane, mark.name, mark.begin.seconds_since(self.base), mark.end.seconds_since(self.base))
            for mark in passed
        ]


@dataclass(slots=True)
class _Span:
    """A context manager of its own, not a generator: several are made for every step."""

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
        self.trace.spent(self.name, self.begin)


class Trace:
    """Spans of the executor's thread, and of the device's streams beside them. For the executor's thread."""

    def __init__(self, path: Path | None = None, *, seconds: float = 60.0) -> None:
        """Record `seconds` of work from `start` on, and write them to `path`; without a path, record nothing."""
        self._path = path
        self._seconds = seconds
        self._recording: _Recording | None = None
        self.began = 0.0  # on perf_counter's clock: the origin of what is written

    def start(self, stream: Stream) -> None:
        """Begin, with the device idle."""
        if self._path:
            base = stream.record(timed=True)
            base.wait()
            self.began = time.perf_counter()
            self._recording = _Recording(self._path, base, self.began, self._seconds)

    def span(self, name: str) -> AbstractContextManager[None]:
        """What the executor's thread does in the body."""
        return _Span(self, name)

    def spent(self, name: str, begin: float) -> None:
        """The executor's thread has done something since `begin`, on perf_counter's clock."""
        if self._recording:
            began = self._recording.began
            self._recording.spans.append((_HOST, name, begin - began, time.perf_counter() - began))

    def device(self, name: str, stream: Stream, *, lane: str) -> AbstractContextManager[None]:
        """What the device does of that which the body gives to `stream`."""
        return self._recording.mark(name, stream, lane) if self._recording else _NOTHING

    def collect(self) -> None:
        """Read what the device has passed; write the file when the time is over."""
        if self._recording:
            self._recording.collect()
            if self._recording.over:
                recording, self._recording = self._recording, None
                # In a thread: it is megabytes, for which nobody's step should wait.
                threading.Thread(target=_write, args=(recording.path, recording.spans), name="trace").start()

    def close(self) -> None:
        """Write what was recorded, if the time was not over."""
        if self._recording:
            with suppress(DeviceLost):  # what it passed before is told all the same
                self._recording.collect()
            _write(self._recording.path, self._recording.spans)
            self._recording = None


def _write(path: Path, spans: list[tuple[str, str, float, float]]) -> None:
    lanes = sorted({lane for lane, *_ in spans}, key=lambda lane: (lane != _HOST, lane))
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": index, "name": "thread_name", "args": {"name": lane}}
        for index, lane in enumerate(lanes)
    ]
    events += [
        {"ph": "X", "pid": 1, "tid": lanes.index(lane), "name": name, "ts": begin * 1e6, "dur": (end - begin) * 1e6}
        for lane, name, begin, end in spans
    ]
    try:
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
    except OSError as error:
        _log.error("the trace cannot be written: %s", error)
    else:
        _log.info("wrote %d spans to %s: open it in https://ui.perfetto.dev", len(spans), path)
