"""What a trace of the server says: how long steps take on the device, what lies between them, what the host does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

HOST, STEPS, DECODES = "executor", "steps", "decode"  # the tracks of server.trace
_WORK = ("plan", "launch", "complete")  # what the host does for every step


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of work. Times are seconds since the trace began."""

    track: str
    name: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


Window = tuple[float, float]  # seconds since the trace began


def read_trace(path: Path) -> tuple[Span, ...]:
    """The spans in a file that `server.runtime.trace` wrote, in the order in which they began."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = (
        Span(tracks[event["tid"]], event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in events
        if event["ph"] == "X"
    )
    return tuple(sorted(spans, key=lambda span: span.begin))


def inside(spans: Iterable[Span], window: Window) -> tuple[Span, ...]:
    """Those that begin and end in `window`."""
    begin, end = window
    return tuple(span for span in spans if begin <= span.begin and span.end <= end)


def steps_in(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The steps on the device."""
    return tuple(span for span in spans if span.track == STEPS)


def rows_of(step: Span) -> int:
    """The rows that were asked of a step; 0 where its name does not tell."""
    found = re.search(r"(\d+) rows", step.name)
    return int(found[1]) if found else 0


def idle_share(steps: Sequence[Span]) -> float | None:
    """The part of the time from the first step to the last in which the device did none; None for less than two."""
    if len(steps) < 2:
        return None
    gaps = sum(max(later.begin - earlier.end, 0.0) for earlier, later in pairwise(steps))
    return gaps / (steps[-1].end - steps[0].begin)


def host_per_step(spans: Iterable[Span]) -> float | None:
    """Seconds that the host works for each step: planning it, launching it, and what follows when it has landed.

    What is done inside those spans, such as launching a decode, is in them; waiting for the device is not.
    """
    host = [span for span in spans if span.track == HOST and span.name in _WORK]
    launches = sum(span.name == "launch" for span in host)
    return sum(span.seconds for span in host) / launches if launches else None


def waiting_share(spans: Iterable[Span], window: Window) -> float:
    """The part of `window` in which the host had nothing to do but wait for a step: 0 where the host is the limit."""
    begin, end = window
    return sum(span.seconds for span in spans if span.track == HOST and span.name == "wait") / (end - begin)


def by_company(spans: Sequence[Span]) -> tuple[list[float], list[float]]:
    """Seconds of the steps that had the device to themselves, and of those during which something was decoded."""
    decodes = [span for span in spans if span.track == DECODES]
    alone: list[float] = []
    beside: list[float] = []
    for step in steps_in(spans):
        shared = any(decode.begin < step.end and step.begin < decode.end for decode in decodes)
        (beside if shared else alone).append(step.seconds)
    return alone, beside
