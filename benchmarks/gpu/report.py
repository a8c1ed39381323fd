"""The one table over a record: figures, what we aim at beside them, and plainly what was not measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.markup import escape
from rich.table import Table

from benchmarks.gpu.figures import POLICIES, Built, Decoding, Full, Latencies, Load, Peak, Rows, Serving
from benchmarks.gpu.results_file import Record, Stage
from benchmarks.models import ARCHITECTURES
from engines.backends.registry import ON_CPU
from loadtest.statistics import Spread

_SPEED_UP = 4.0  # times PyTorch eager
_IDLE = 0.03  # of the device's time
_GOODPUT, _P99 = 0.35, 0.30  # more, and less, than request-level batching
_LOAD = 0.8  # at which that is asked
_ENOUGH = 100  # requests, for a hundredth of them to say something
_TENSORRT = ("tensorrt", "tensorrt_rtx")
Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True)
class Line:
    """One figure. `met` is None where nothing is aimed at, or it cannot be told."""

    model: str
    engine: str
    figure: str
    measured: str
    target: str = ""
    met: bool | None = None


def table(record: Record) -> Table:
    """Every figure of `record`."""
    made = Table(title=f"{record.device}, {record.runs[-1].began[:10]}" if record.runs else record.device)
    for heading in ("model", "engine", "figure", "measured", "target"):
        made.add_column(heading, overflow="fold", ratio=1 if heading == "measured" else None)
    previous = ("", "")
    for line in lines(record):
        if (line.model, line.engine) != previous:
            made.add_section()
        previous = (line.model, line.engine)
        cells = (line.model, line.engine, line.figure, line.measured, _verdict(line))
        made.add_row(*(escape(cell) for cell in cells[:-1]), cells[-1])
    return made


def lines(record: Record) -> Iterator[Line]:
    """The table's rows."""
    peak = _found(record, Peak, "peak")
    measured = f"{peak.flops / 1e12:.0f} TFLOP/s, {peak.side}×{peak.side}" if peak else _why(record, "peak")
    yield Line("", "PyTorch", "largest FP16 matrix product", measured)
    for model in dict.fromkeys(result.model for result in record.results if result.model):
        yield from _torch_lines(record, model)
        engines = dict.fromkeys(
            result.engine for result in record.results if result.model == model and result.engine not in {"", "PyTorch"}
        )
        for engine in engines or ("ours",):
            yield from _engine_lines(record, model, engine, peak)


def _torch_lines(record: Record, model: str) -> Iterator[Line]:
    stages: tuple[tuple[Stage, str], ...] = (("torch", "eager"), ("compile", "compiled"))
    for stage, name in stages:
        found = _found(record, Latencies, stage, model, "PyTorch")
        if found is None:
            yield Line(model, "PyTorch", f"{name}, one picture", _why(record, stage, model, "PyTorch"))
            continue
        for steps, spread in found.by_steps.items():
            measured = f"{_spread(spread)}; the first {_time(found.first)}" if stage == "compile" else _spread(spread)
            yield Line(model, "PyTorch", f"{name}, one picture, {steps} steps, {found.precision}", measured)


def _engine_lines(record: Record, model: str, engine: str, peak: Peak | None) -> Iterator[Line]:
    yield from _build_lines(record, model, engine)
    yield from _single_lines(record, model, engine)
    yield from _rows_lines(record, model, engine, peak)
    yield from _decode_lines(record, model, engine)
    yield from _serve_lines(record, model, engine)


def _build_lines(record: Record, model: str, engine: str) -> Iterator[Line]:
    result = record.find("build", model, engine)
    if result and isinstance(result.figures, Built):
        built = result.figures
        how = "as it was" if built.kept else f"built in {_time(result.seconds)}"
        yield Line(model, engine, "bundle", f"{built.size}, {built.precision}, {_list(built.rows)} rows, {how}")
    elif result:
        yield Line(model, engine, "bundle", _why(record, "build", model, engine))


def _single_lines(record: Record, model: str, engine: str) -> Iterator[Line]:
    found = _found(record, Latencies, "single", model, engine)
    target = f"TensorRT: ≥ {_SPEED_UP:.0f}× eager"
    if found is None:
        yield Line(model, engine, "one picture", _why(record, "single", model, engine), target)
        return
    eager = _found(record, Latencies, "torch", model, "PyTorch")
    for steps, spread in found.by_steps.items():
        theirs = eager.by_steps.get(steps) if eager else None
        factor = theirs.median / spread.median if theirs else None
        beside = f"{factor:.2f}× PyTorch eager" if factor else "PyTorch eager not measured"
        met = factor >= _SPEED_UP if factor and engine in _TENSORRT else None
        figure = f"one picture, {steps} steps, {found.precision}"
        yield Line(model, engine, figure, f"{_spread(spread)}; {beside}{_broken(found.broken)}", target, met)


def _rows_lines(record: Record, model: str, engine: str, peak: Peak | None) -> Iterator[Line]:
    found = _found(record, Rows, "rows", model, engine)
    if found is None:
        reason = _why(record, "rows", model, engine)
        yield Line(model, engine, "full steps", reason)
        yield Line(model, engine, "device idle between steps", reason, f"< {_IDLE:.0%}")
        yield Line(model, engine, "host per step beside the device", reason, "less than the step")
        return
    for point in found.points:
        yield Line(model, engine, f"{point.rows} rows, {found.steps} steps", _full(point, found, model, peak))
    if found.left_out:
        yield Line(model, engine, f"{_list(found.left_out)} rows", "not measured: no time was left")
    yield _idle_line(found, model, engine)
    yield _host_line(found, model, engine)
    yield from _company_lines(found, model, engine)


def _full(point: Full, rows: Rows, model: str, peak: Peak | None) -> str:
    seconds = rows.step_seconds(point.rows)
    parts = [f"{point.images_per_second:.2f} pictures/s"]
    if seconds:
        parts.append(f"{_time(seconds)} a step")
        parts.append(_share(point.rows / seconds, model, peak))
    return ", ".join(parts)


def _share(rows_per_second: float, model: str, peak: Peak | None) -> str:
    """Of the measured peak, by the work of one UNet row."""
    if peak is None or model not in ARCHITECTURES:
        return "share of peak not measured"
    return f"{rows_per_second * ARCHITECTURES[model].work.row / peak.flops:.0%} of peak"


def _idle_line(found: Rows, model: str, engine: str) -> Line:
    shares = {point.rows: point.idle_share for point in found.points if point.idle_share is not None}
    figure = "device idle between steps"
    if not shares:
        return Line(model, engine, figure, "not measured: no step was traced", f"< {_IDLE:.0%}")
    text = ", ".join(f"{share:.1%} at {rows}" for rows, share in shares.items())
    met = None if engine in ON_CPU else max(shares.values()) < _IDLE
    return Line(model, engine, figure, f"{text} rows", f"< {_IDLE:.0%}", met)


def _host_line(found: Rows, model: str, engine: str) -> Line:
    figure, target = "host per step beside the device", "less than the step"
    told = {point.rows: point for point in found.points if point.host_per_step is not None}
    if not told:
        return Line(model, engine, figure, "not measured: the host is the device", target)
    texts, met = [], True
    for rows, point in told.items():
        host, device = point.host_per_step or 0.0, found.step_seconds(rows) or 0.0
        met &= host < device
        texts.append(f"{_time(host)} of {_time(device)} at {rows}, {point.waiting_share or 0:.0%} waiting")
    return Line(model, engine, figure, "; ".join(texts), target, met)


def _company_lines(found: Rows, model: str, engine: str) -> Iterator[Line]:
    pairs = [
        f"{_time(point.step_alone.median)} alone, {_time(point.step_beside_decode.median)} beside at {point.rows}"
        for point in found.points
        if point.step_alone and point.step_beside_decode
    ]
    text = "; ".join(pairs) or "not measured: no step ran beside a decode and none alone"
    yield Line(model, engine, "a step beside a decode", text)


def _decode_lines(record: Record, model: str, engine: str) -> Iterator[Line]:
    found = _found(record, Decoding, "decode", model, engine)
    text = _why(record, "decode", model, engine)
    if found:
        text = f"{found.beside:.2f} pictures/s beside, {found.between:.2f} between, {found.rows} rows"
    yield Line(model, engine, "decoding beside or between steps", text)


def _serve_lines(record: Record, model: str, engine: str) -> Iterator[Line]:
    found = _found(record, Serving, "serve", model, engine)
    target = f"goodput +{_GOODPUT:.0%} or p99 -{_P99:.0%}"
    if found is None:
        reason = _why(record, "serve", model, engine)
        yield Line(model, engine, f"{_LOAD:.0%} load", reason, target)
        return
    shares = " to ".join(map(str, sorted(found.unloaded)))
    yield Line(model, engine, f"full, {shares} steps mixed", f"{found.capacity:.2f} pictures/s, {found.rows} rows")
    for load in found.loads:
        asked = abs(load.share - _LOAD) < 1e-9
        figure = f"{load.share:.0%} load, {len(load.steps)} requests"
        more, less = _gains(found, load)
        enough = len(load.steps) >= _ENOUGH
        met = (more >= _GOODPUT or less >= _P99) if asked and enough else None
        measured = "\n".join([*(_policy(found, load, index) for index in range(len(POLICIES))), _gain(more, less)])
        yield Line(model, engine, figure, measured, target if asked else "", met)


def _policy(found: Serving, load: Load, index: int) -> str:
    policy = POLICIES[index]
    p50, p99 = (_time(found.percentile(load, policy, q)) for q in (50, 99))
    return f"{policy}: p50 {p50}, p99 {p99}, {found.goodput(load, policy):.2f}/s within {found.slo:g}×"


def _gains(found: Serving, load: Load) -> tuple[float, float]:
    """How much more goodput, and how much less p99, batching by step has than by request."""
    ours, theirs = (found.goodput(load, policy) for policy in POLICIES)
    fast, slow = (found.percentile(load, policy, 99) for policy in POLICIES)
    more = ours / theirs - 1 if theirs else float("inf" if ours else 0)
    return more, 1 - fast / slow


def _gain(more: float, less: float) -> str:
    return f"goodput {more:+.0%}, p99 {-less:+.0%}"


def _found(record: Record, kind: type[Kind], stage: Stage, model: str = "", engine: str = "") -> Kind | None:
    result = record.find(stage, model, engine)
    return result.figures if result and isinstance(result.figures, kind) else None


def _why(record: Record, stage: Stage, model: str = "", engine: str = "") -> str:
    result = record.find(stage, model, engine)
    return f"not measured: {result.note}" if result and result.note else "not measured"


def _verdict(line: Line) -> str:
    if line.met is None:
        return line.target
    return f"{line.target}: [green]met[/]" if line.met else f"{line.target}: [red]missed[/]"


def _spread(spread: Spread) -> str:
    return f"{_time(spread.median)} ({_time(spread.low)} to {_time(spread.high)}, {len(spread.values)} runs)"


def _broken(count: int) -> str:
    return f"; {count} pictures not finite" if count else ""


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
