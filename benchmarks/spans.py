"""Reads the traces of a server: how long steps take on the device, the gaps between them, and what the host does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

HOST, STEPS, DECODES = "executor", "steps", "decode"  # the tracks of server.runtime.monitoring.trace
_WORK = ("plan", "launch", "complete")  # the host's work for every step


@dataclass(frozen=True, slots=True)
class TraceSpan:
    """A piece of work. Times are seconds since the trace began."""

    track: str
    name: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


Window = tuple[float, float]  # seconds since the trace began


def read_trace(path: Path) -> tuple[TraceSpan, ...]:
    """The spans in a file that `server.runtime.monitoring.trace` wrote, in the order in which they began."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = (
        TraceSpan(tracks[event["tid"]], event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in events
        if event["ph"] == "X"
    )
    return tuple(sorted(spans, key=lambda span: span.begin))


def inside(spans: Iterable[TraceSpan], window: Window) -> tuple[TraceSpan, ...]:
    """The spans that begin and end in `window`."""
    begin, end = window
    return tuple(span for span in spans if begin <= span.begin and span.end <= end)


def steps_in(spans: Iterable[TraceSpan]) -> tuple[TraceSpan, ...]:
    """The spans of steps on the device."""
    return tuple(span for span in spans if span.track == STEPS)


def rows_of(step: TraceSpan) -> int:
    """The rows that a step was launched with; 0 if its name has no number."""
    found = re.search(r"(\d+) rows", step.name)
    return int(found[1]) if found else 0


def idle_share(steps: Sequence[TraceSpan]) -> float | None:
    """The share of time between the first and the last step in which no step ran; None for less than two steps."""
    if len(steps) < 2:
        return None
    gaps = sum(max(later.begin - earlier.end, 0.0) for earlier, later in pairwise(steps))
    return gaps / (steps[-1].end - steps[0].begin)


def host_per_step(spans: Iterable[TraceSpan]) -> float | None:
    """Seconds of the host's work for each step: planning, launching and completing it; None without a launch.

    Work inside those spans, such as launching a decode, counts; waiting for the device does not.
    """
    host = [span for span in spans if span.track == HOST and span.name in _WORK]
    launches = sum(span.name == "launch" for span in host)
    return sum(span.seconds for span in host) / launches if launches else None


def waiting_share(spans: Iterable[TraceSpan], window: Window) -> float:
    """The share of `window` in which the host waited for a step: 0 where the host is the bottleneck."""
    begin, end = window
    return sum(span.seconds for span in spans if span.track == HOST and span.name == "wait") / (end - begin)


def by_overlap(spans: Sequence[TraceSpan]) -> tuple[list[float], list[float]]:
    """Seconds of each step that ran alone, and of each that overlapped a decode."""
    decodes = [span for span in spans if span.track == DECODES]
    alone: list[float] = []
    overlapped: list[float] = []
    for step in steps_in(spans):
        overlaps = any(decode.begin < step.end and step.begin < decode.end for decode in decodes)
        (overlapped if overlaps else alone).append(step.seconds)
    return alone, overlapped
