"""Draw docs/timeline.svg: what executor and device do around the decode of an image.

python -m tests.tools.timeline --out docs/timeline.svg

Executor and device are in virtual time: the order of operations is that on a GPU, and their durations are made up.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.spans import TraceSpan, read_trace
from server.runtime.monitoring.trace import Trace
from tests.support.virtual import VirtualDevice, VirtualRun

_STEP = 0.02  # seconds
_ROUND = 60 * _STEP
_WIDTH, _LEFT, _TRACK_HEIGHT, _TOP = 1200, 120, 54, 56  # pixels
_TRACKS = ("executor", "steps", "encode", "decode")
_TITLES = {"executor": "executor (host)", "steps": "steps", "encode": "encode", "decode": "decode"}
_COLOURS = {
    "wait": "#e5e7eb",
    "steps": "#2563eb",
    "encode": "#059669",
    "decode": "#d97706",
    "executor": "#111827",
}


def record(path: Path) -> Sequence[TraceSpan]:
    """Trace, twice, two requests that run and one that arrives later; the first time teaches how long steps take."""
    trace = Trace(path)
    run = VirtualRun(lambda clock: VirtualDevice(clock, seconds=_device_seconds, host=_host_seconds), trace=trace)

    begins: list[float] = []

    def scenario() -> None:
        begins.extend((run.clock.now, run.clock.now + _ROUND))
        for number, begin in enumerate(begins):  # a prompt for each, since prompts that are known are not encoded
            for moment, steps, prompt in ((0, 8, 9), (0, 24, 9), (5.5, 12, number)):
                run.clock.at(begin + moment * _STEP, partial(run.ask, steps=steps, seed=prompt))
        run.clock.at(begins[-1] + _ROUND, run.close)

    run.run(scenario)
    return [span for span in read_trace(path) if span.begin >= begins[-1] - trace.began]


def _device_seconds(graph: str, _rows: int) -> float:
    """What a run of a graph takes on its stream."""
    return {"denoise": _STEP, "encode_prompt": 0.4 * _STEP, "decode": _STEP / 2}.get(graph, _STEP / 20)


def _host_seconds(graph: str, _rows: int) -> float:
    """What the launch of a graph takes."""
    return 0.0006 if graph == "denoise" else 0.0003


def draw(spans: Sequence[TraceSpan]) -> str:
    """Draw the time around the first decode as SVG."""
    decode = next(span for span in spans if span.track == "decode")
    steps = [span for span in spans if span.track == "steps"]
    near = next(index for index, span in enumerate(steps) if span.end >= decode.begin)
    begin, end = steps[max(near - 4, 0)].begin - 0.004, steps[min(near + 4, len(steps) - 1)].end
    height = _TOP + _TRACK_HEIGHT * len(_TRACKS) + 40
    body = "\n".join([*_axis(begin, end, height), *_rectangles(spans, begin, end), *_threads(spans, begin, end)])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="system-ui, sans-serif" '
        f'font-size="13">\n<rect width="{_WIDTH}" height="{height}" fill="white"/>\n'
        f'<text x="{_LEFT}" y="24" font-size="16" fill="#111827">Steps are launched shortly before their predecessors '
        f"end; new requests are encoded and finished images decoded in parallel</text>\n{body}\n</svg>\n"
    )


def _x(time: float, begin: float, end: float) -> float:
    return _LEFT + (time - begin) / (end - begin) * (_WIDTH - _LEFT - 20)


def _y(track: str) -> int:
    return _TOP + _TRACK_HEIGHT * _TRACKS.index(track)


def _axis(begin: float, end: float, height: int) -> Iterator[str]:
    for track in _TRACKS:
        yield f'<text x="10" y="{_y(track) + 20}" fill="#374151">{_TITLES[track]}</text>'
        yield f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{_y(track) + 32}" y2="{_y(track) + 32}" stroke="#e5e7eb"/>'
    total = int((end - begin) * 1000)
    apart = next(apart for apart in (5, 10, 20, 50, 100, 200, 500, 1000) if total / apart < 14)
    for tick in range(0, total + 1, apart):
        x = _x(begin + tick / 1000, begin, end)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 8}" y2="{height - 30}" stroke="#f3f4f6"/>'
        yield f'<text x="{x:.1f}" y="{height - 12}" text-anchor="middle" fill="#6b7280">{tick} ms</text>'


def _rectangles(spans: Sequence[TraceSpan], begin: float, end: float) -> Iterator[str]:
    number = 0
    for span in spans:
        number += span.track == "steps"
        if span.end < begin or span.begin > end or span.track not in _TRACKS:
            continue
        left, right = (min(max(_x(time, begin, end), _LEFT), _WIDTH - 20) for time in (span.begin, span.end))
        colour = _COLOURS.get(span.name, _COLOURS[span.track])
        yield (
            f'<rect x="{left:.1f}" y="{_y(span.track)}" width="{max(right - left, 1.2):.1f}" height="28" rx="2" '
            f'fill="{colour}"><title>{escape(span.name)}: {1000 * (span.end - span.begin):.1f} ms</title></rect>'
        )
        if span.track == "steps" and right - left > 30:
            middle = (left + right) / 2
            yield f'<text x="{middle:.1f}" y="{_y("steps") + 19}" text-anchor="middle" fill="white">{number}</text>'
        if span.track in {"encode", "decode"}:
            yield f'<text x="{right + 5:.1f}" y="{_y(span.track) + 19}" fill="#374151">{escape(span.name)}</text>'


def _threads(spans: Sequence[TraceSpan], begin: float, end: float) -> Iterator[str]:
    """Draw a line from each launch to its step."""
    launches = [span for span in spans if span.name == "launch"]
    steps = [span for span in spans if span.track == "steps"]
    for launch, step in zip(launches, steps, strict=True):
        if begin <= launch.begin and step.begin <= end:
            yield (
                f'<line x1="{_x(launch.end, begin, end):.1f}" y1="{_y("executor") + 28}" '
                f'x2="{_x(step.begin, begin, end):.1f}" y2="{_y("steps")}" stroke="#111827" stroke-width="1.2"/>'
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/timeline.svg"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given.out.write_text(draw(record(Path(folder) / "trace.json")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
