"""The table of a results file: measurements, their targets, and what was not measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.markup import escape
from rich.table import Table

from benchmarks.gpu.figures import POLICIES, Built, Decoding, FullSteps, Latencies, Peak, Rows, ServedLoad, Serving
from benchmarks.gpu.results_file import GpuResults, Stage
from benchmarks.models import ARCHITECTURES
from engines.backends.registry import ON_CPU
from loadtest.analysis.statistics import Spread

_SPEED_UP = 4.0  # times PyTorch eager
_IDLE = 0.03  # of the device's time
_GOODPUT, _P99 = 0.35, 0.30  # goodput and p99 compared with request-level batching
_LOAD = 0.8  # at which that is the target
_ENOUGH = 100  # requests that a p99 needs to be meaningful
_TENSORRT = ("tensorrt", "tensorrt_rtx")
Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True)
class ReportRow:
    """One measurement. `met` is None without a target, or if it cannot be judged."""

    model: str
    engine: str
    figure: str
    measured: str
    target: str = ""
    met: bool | None = None


def table(record: GpuResults) -> Table:
    """All measurements."""
    made = Table(title=f"{record.device}, {record.runs[-1].began[:10]}" if record.runs else record.device)
    for heading in ("model", "engine", "measurement", "result", "target"):
        made.add_column(heading, overflow="fold", ratio=1 if heading == "result" else None)
    previous = ("", "")
    for line in lines(record):
        if (line.model, line.engine) != previous:
            made.add_section()
        previous = (line.model, line.engine)
        cells = (line.model, line.engine, line.figure, line.measured, _verdict(line))
        made.add_row(*(escape(cell) for cell in cells[:-1]), cells[-1])
    return made


def lines(record: GpuResults) -> Iterator[ReportRow]:
    """The table's rows."""
    peak = _found(record, Peak, "peak")
    measured = f"{peak.flops / 1e12:.0f} TFLOP/s, {peak.side}×{peak.side}" if peak else _why(record, "peak")
    yield ReportRow("", "PyTorch", "largest FP16 matrix product", measured)
    for model in dict.fromkeys(result.model for result in record.results if result.model):
        yield from _torch_lines(record, model)
        engines = dict.fromkeys(
            result.engine for result in record.results if result.model == model and result.engine not in {"", "PyTorch"}
        )
        for engine in engines or ("ours",):
            yield from _engine_lines(record, model, engine, peak)


def _torch_lines(record: GpuResults, model: str) -> Iterator[ReportRow]:
    stages: tuple[tuple[Stage, str], ...] = (("torch", "eager"), ("compile", "compiled"))
    for stage, name in stages:
        found = _found(record, Latencies, stage, model, "PyTorch")
        if found is None:
            yield ReportRow(model, "PyTorch", f"{name}, one image", _why(record, stage, model, "PyTorch"))
            continue
        for steps, spread in found.by_steps.items():
            measured = f"{_spread(spread)}; first image {_time(found.first)}" if stage == "compile" else _spread(spread)
            yield ReportRow(model, "PyTorch", f"{name}, one image, {steps} steps, {found.precision}", measured)


def _engine_lines(record: GpuResults, model: str, engine: str, peak: Peak | None) -> Iterator[ReportRow]:
    yield from _build_lines(record, model, engine)
    yield from _single_lines(record, model, engine)
    yield from _rows_lines(record, model, engine, peak)
    yield from _decode_lines(record, model, engine)
    yield from _serve_lines(record, model, engine)


def _build_lines(record: GpuResults, model: str, engine: str) -> Iterator[ReportRow]:
    result = record.find("build", model, engine)
    if result and isinstance(result.figures, Built):
        built = result.figures
        how = "already built" if built.kept else f"built in {_time(result.seconds)}"
        yield ReportRow(model, engine, "bundle", f"{built.size}, {built.precision}, {_list(built.rows)} rows, {how}")
    elif result:
        yield ReportRow(model, engine, "bundle", _why(record, "build", model, engine))


def _single_lines(record: GpuResults, model: str, engine: str) -> Iterator[ReportRow]:
    found = _found(record, Latencies, "single", model, engine)
    target = f"TensorRT: ≥ {_SPEED_UP:.0f}× eager"
    if found is None:
        yield ReportRow(model, engine, "one image", _why(record, "single", model, engine), target)
        return
    eager = _found(record, Latencies, "torch", model, "PyTorch")
    for steps, spread in found.by_steps.items():
        theirs = eager.by_steps.get(steps) if eager else None
        factor = theirs.median / spread.median if theirs else None
        speed_up = f"{factor:.2f}× PyTorch eager" if factor else "PyTorch eager not measured"
        met = factor >= _SPEED_UP if factor and engine in _TENSORRT else None
        figure = f"one image, {steps} steps, {found.precision}"
        yield ReportRow(model, engine, figure, f"{_spread(spread)}; {speed_up}{_broken(found.broken)}", target, met)


def _rows_lines(record: GpuResults, model: str, engine: str, peak: Peak | None) -> Iterator[ReportRow]:
    found = _found(record, Rows, "rows", model, engine)
    if found is None:
        reason = _why(record, "rows", model, engine)
        yield ReportRow(model, engine, "full steps", reason)
        yield ReportRow(model, engine, "device idle between steps", reason, f"< {_IDLE:.0%}")
        yield ReportRow(model, engine, "host time per step, of device time", reason, "less than the step")
        return
    for point in found.points:
        yield ReportRow(model, engine, f"{point.rows} rows, {found.steps} steps", _full(point, found, model, peak))
    if found.left_out:
        yield ReportRow(model, engine, f"{_list(found.left_out)} rows", "not measured: out of time")
    yield _idle_line(found, model, engine)
    yield _host_line(found, model, engine)
    yield from _overlap_lines(found, model, engine)


def _full(point: FullSteps, rows: Rows, model: str, peak: Peak | None) -> str:
    seconds = rows.step_seconds(point.rows)
    parts = [f"{point.images_per_second:.2f} images/s"]
    if seconds:
        parts.append(f"{_time(seconds)} per step")
        parts.append(_share(point.rows / seconds, model, peak))
    return ", ".join(parts)


def _share(rows_per_second: float, model: str, peak: Peak | None) -> str:
    """Share of the measured peak, by the operations of one UNet row."""
    if peak is None or model not in ARCHITECTURES:
        return "share of peak not measured"
    return f"{rows_per_second * ARCHITECTURES[model].flops.row / peak.flops:.0%} of peak"


def _idle_line(found: Rows, model: str, engine: str) -> ReportRow:
    shares = {point.rows: point.idle_share for point in found.points if point.idle_share is not None}
    figure = "device idle between steps"
    if not shares:
        return ReportRow(model, engine, figure, "not measured: no step was traced", f"< {_IDLE:.0%}")
    text = ", ".join(f"{share:.1%} at {rows}" for rows, share in shares.items())
    met = None if engine in ON_CPU else max(shares.values()) < _IDLE
    return ReportRow(model, engine, figure, f"{text} rows", f"< {_IDLE:.0%}", met)


def _host_line(found: Rows, model: str, engine: str) -> ReportRow:
    figure, target = "host time per step, of device time", "less than the step"
    timed = {point.rows: point for point in found.points if point.host_per_step is not None}
    if not timed:
        return ReportRow(model, engine, figure, "not measured: the host is the device", target)
    texts, met = [], True
    for rows, point in timed.items():
        host, device = point.host_per_step or 0.0, found.step_seconds(rows) or 0.0
        met &= host < device
        texts.append(f"{_time(host)} of {_time(device)} at {rows}, {point.waiting_share or 0:.0%} waiting")
    return ReportRow(model, engine, figure, "; ".join(texts), target, met)


def _overlap_lines(found: Rows, model: str, engine: str) -> Iterator[ReportRow]:
    pairs = [
        f"{_time(point.step_alone.median)} alone, "
        f"{_time(point.step_overlapping_decode.median)} overlapped at {point.rows}"
        for point in found.points
        if point.step_alone and point.step_overlapping_decode
    ]
    text = "; ".join(pairs) or "not measured: no step overlapped a decode, or none ran alone"
    yield ReportRow(model, engine, "step time with an overlapping decode", text)


def _decode_lines(record: GpuResults, model: str, engine: str) -> Iterator[ReportRow]:
    found = _found(record, Decoding, "decode", model, engine)
    text = _why(record, "decode", model, engine)
    if found:
        rates = ", ".join(f"{rate:.2f} {priority}" for priority, rate in found.rates.items())
        text = f"images/s: {rates}, {found.rows} rows"
    yield ReportRow(model, engine, "priority of decodes", text)


def _serve_lines(record: GpuResults, model: str, engine: str) -> Iterator[ReportRow]:
    found = _found(record, Serving, "serve", model, engine)
    target = f"goodput +{_GOODPUT:.0%} or p99 -{_P99:.0%}"
    if found is None:
        reason = _why(record, "serve", model, engine)
        yield ReportRow(model, engine, f"{_LOAD:.0%} load", reason, target)
        return
    shares = " to ".join(map(str, sorted(found.unloaded)))
    yield ReportRow(model, engine, f"full, {shares} steps mixed", f"{found.capacity:.2f} images/s, {found.rows} rows")
    for load in found.loads:
        is_target = abs(load.share - _LOAD) < 1e-9
        figure = f"{load.share:.0%} load, {len(load.steps)} requests"
        more, less = _gains(found, load)
        enough = len(load.steps) >= _ENOUGH
        met = (more >= _GOODPUT or less >= _P99) if is_target and enough else None
        measured = "\n".join([*(_policy(found, load, index) for index in range(len(POLICIES))), _gain(more, less)])
        yield ReportRow(model, engine, figure, measured, target if is_target else "", met)


def _policy(found: Serving, load: ServedLoad, index: int) -> str:
    policy = POLICIES[index]
    p50, p99 = (_time(found.percentile(load, policy, q)) for q in (50, 99))
    return f"{policy}: p50 {p50}, p99 {p99}, {found.goodput(load, policy):.2f}/s within {found.slo:g}×"


def _gains(found: Serving, load: ServedLoad) -> tuple[float, float]:
    """Gain in goodput and reduction of p99 of batching by step over batching by request."""
    ours, theirs = (found.goodput(load, policy) for policy in POLICIES)
    fast, slow = (found.percentile(load, policy, 99) for policy in POLICIES)
    more = ours / theirs - 1 if theirs else float("inf" if ours else 0)
    return more, 1 - fast / slow


def _gain(more: float, less: float) -> str:
    return f"goodput {more:+.0%}, p99 {-less:+.0%}"


def _found(record: GpuResults, kind: type[Kind], stage: Stage, model: str = "", engine: str = "") -> Kind | None:
    result = record.find(stage, model, engine)
    return result.figures if result and isinstance(result.figures, kind) else None


def _why(record: GpuResults, stage: Stage, model: str = "", engine: str = "") -> str:
    result = record.find(stage, model, engine)
    return f"not measured: {result.note}" if result and result.note else "not measured"


def _verdict(line: ReportRow) -> str:
    if line.met is None:
        return line.target
    return f"{line.target}: [green]met[/]" if line.met else f"{line.target}: [red]missed[/]"


def _spread(spread: Spread) -> str:
    return f"{_time(spread.median)} ({_time(spread.low)} to {_time(spread.high)}, {len(spread.values)} runs)"


def _broken(count: int) -> str:
    return f"; {count} images not finite" if count else ""


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
