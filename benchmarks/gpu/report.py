"""The table of a results file: measurements, their targets, and what was not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from rich.markup import escape
from rich.table import Table

from benchmarks.gpu.figures import (
    POLICIES,
    Batch,
    Built,
    Decoding,
    FullSteps,
    Latencies,
    Peak,
    Rows,
    ServedLoad,
    Serving,
)
from benchmarks.gpu.results_file import PYTORCH, GpuResults, Stage, StageResult, pytorch_at, trace_name
from benchmarks.lora.report import named
from benchmarks.lora.results import TimedSteps
from benchmarks.models import ARCHITECTURES
from engines.backends.registry import ON_CPU
from loadtest.analysis.statistics import Spread

_OVER_EAGER = {"tensorrt": 4.0, "tensorrt_rtx": 4.0, "onnxruntime_cuda": 2.0}  # one image, times PyTorch eager
_OVER_COMPILED = {"tensorrt": 1.5, "tensorrt_rtx": 1.5}  # and compiled
_TARGET_STEPS = 50  # at which those are the targets
_TARGET_ROWS, _OF_PEAK = 32, 0.6  # share of the measured peak in full steps
_IMAGES = {"small": 29.0, "sd15": 20.0}  # per second at that many rows and 20 steps, of an H200
_IMAGE_STEPS = 20
_IDLE = 0.03  # of the device's time
_GOODPUT, _P99 = 0.35, 0.30  # goodput and p99 compared with request-level batching
_LOAD = 0.8  # at which that is the target
_ENOUGH = 100  # requests that a p99 needs to be meaningful
_EVIDENCE = """Evidence, the strongest first: (1) results above are measured on this device, ratios within this table;
(2) captures, copies and allocations are counted by tests over stub libraries of CUDA, without a GPU;
(3) targets are aims, taken from published figures of others; what is marked 'not measured' is not known."""
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
    title = f"{record.device}, {record.runs[-1].began[:10]}" if record.runs else record.device
    made = Table(title=title, caption=_EVIDENCE, caption_justify="left")
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
            result.engine for result in record.results if result.model == model and not _is_torch(result.engine)
        )
        for engine in engines or ("ours",):
            yield from _engine_lines(record, model, engine)


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

    for result in record.results:
        if result.model == model and result.stage in {"batch", "compile_batch"}:
            yield _batch_line(result)


def _is_torch(engine: str) -> bool:
    return not engine or engine.startswith(PYTORCH)


def _batch_line(result: StageResult) -> ReportRow:
    name = "eager" if result.stage == "batch" else "compiled"
    figure, found = f"{name}, {result.engine.removeprefix(f'{PYTORCH} at ')}", result.figures
    if not isinstance(found, Batch):
        return ReportRow(result.model, PYTORCH, figure, f"not measured: {result.note}")
    measured = f"{found.images_per_second:.2f} images/s; a call {_spread(found.seconds)}"
    return ReportRow(result.model, PYTORCH, f"{figure}, {found.steps} steps, {found.precision}", measured)


def _engine_lines(record: GpuResults, model: str, engine: str) -> Iterator[ReportRow]:
    yield from _build_lines(record, model, engine)
    yield from _single_lines(record, model, engine)
    yield from _rows_lines(record, model, engine)
    yield from _decode_lines(record, model, engine)
    yield from _serve_lines(record, model, engine)
    yield from _lora_lines(record, model, engine)
    if _found(record, Rows, "rows", model, engine):
        yield ReportRow(model, engine, "profile of the steps", f"{trace_name(model, engine)}, for Perfetto")


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
    if found is None:
        yield ReportRow(model, engine, "one image", _why(record, "single", model, engine), _target(engine))
        return
    for steps, spread in found.by_steps.items():
        factors = {
            name: theirs.by_steps[steps].median / spread.median
            for name, stage in (("eager", "torch"), ("compiled", "compile"))
            if (theirs := _found(record, Latencies, cast(Stage, stage), model, PYTORCH)) and steps in theirs.by_steps
        }
        is_target = steps == _TARGET_STEPS
        yield ReportRow(
            model,
            engine,
            f"one image, {steps} steps, {found.precision}",
            f"{_spread(spread)}; {_speed_ups(factors)}{_broken(found.broken)}",
            _target(engine) if is_target else "",
            _fast_enough(engine, factors) if is_target else None,
        )


def _targets(engine: str) -> dict[str, float]:
    """Factors that one image is to reach, by what it is compared with."""
    both = {"eager": _OVER_EAGER.get(engine), "compiled": _OVER_COMPILED.get(engine)}
    return {name: factor for name, factor in both.items() if factor}


def _target(engine: str) -> str:
    return ", ".join(f"≥ {factor:g}× {name}" for name, factor in _targets(engine).items())


def _fast_enough(engine: str, factors: Mapping[str, float]) -> bool | None:
    """None as long as something that the target names is not measured."""
    targets = _targets(engine)
    if not targets or not targets.keys() <= factors.keys():
        return None
    return all(factors[name] >= least for name, least in targets.items())


def _speed_ups(factors: Mapping[str, float]) -> str:
    return ", ".join(f"{factor:.2f}× PyTorch {name}" for name, factor in factors.items()) or "PyTorch not measured"


def _rows_lines(record: GpuResults, model: str, engine: str) -> Iterator[ReportRow]:
    found = _found(record, Rows, "rows", model, engine)
    if found is None:
        reason = _why(record, "rows", model, engine)
        yield ReportRow(model, engine, "full steps", reason)
        yield ReportRow(model, engine, "device idle between steps", reason, f"< {_IDLE:.0%}")
        yield ReportRow(model, engine, "host time per step, of device time", reason, "less than the step")
        return
    for point in found.points:
        yield _point_line(record, model, engine, found, point)
    if found.left_out:
        yield ReportRow(model, engine, f"{_list(found.left_out)} rows", "not measured: out of time")
    yield _idle_line(found, model, engine)
    yield _host_line(found, model, engine)
    yield from _overlap_lines(found, model, engine)


def _point_line(record: GpuResults, model: str, engine: str, found: Rows, point: FullSteps) -> ReportRow:
    """A number of rows, compared with PyTorch's batches of the same size."""
    peak = _found(record, Peak, "peak")
    measured = "".join([_full(point, found, model, peak), *_over_batches(record, model, found, point)])
    target, met = "", None
    if point.rows == _TARGET_ROWS and found.steps == _IMAGE_STEPS and model in _IMAGES:
        target = f"≥ {_OF_PEAK:.0%} of peak, ≥ {_IMAGES[model]:.0f} images/s"
        share = _share(point, found, model, peak)
        if share is not None and engine not in ON_CPU:
            met = share >= _OF_PEAK and point.images_per_second >= _IMAGES[model]
    return ReportRow(model, engine, f"{point.rows} rows, {found.steps} steps", measured, target, met)


def _over_batches(record: GpuResults, model: str, found: Rows, point: FullSteps) -> Iterator[str]:
    stages: tuple[tuple[Stage, str], ...] = (("batch", "eager"), ("compile_batch", "compiled"))
    for stage, name in stages:
        batch = _found(record, Batch, stage, model, pytorch_at(point.rows))
        if batch and (batch.rows, batch.steps) == (point.rows, found.steps):
            yield f"; {point.images_per_second / batch.images_per_second:.2f}× {name} at as many rows"


def _full(point: FullSteps, rows: Rows, model: str, peak: Peak | None) -> str:
    seconds = rows.step_seconds(point.rows)
    parts = [f"{point.images_per_second:.2f} images/s"]
    if seconds:
        parts.append(f"{_time(seconds)} per step")
        share = _share(point, rows, model, peak)
        parts.append("share of peak not measured" if share is None else f"{share:.0%} of peak")
    return ", ".join(parts)


def _share(point: FullSteps, rows: Rows, model: str, peak: Peak | None) -> float | None:
    """Share of the measured peak, by the operations of one UNet row; None if it is unknown."""
    seconds = rows.step_seconds(point.rows)
    if peak is None or not seconds or model not in ARCHITECTURES:
        return None
    return point.rows / seconds * ARCHITECTURES[model].flops.row / peak.flops


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


def _lora_lines(record: GpuResults, model: str, engine: str) -> Iterator[ReportRow]:
    found = _found(record, TimedSteps, "lora", model, engine)
    if found is None:
        yield ReportRow(model, engine, "steps with LoRAs", _why(record, "lora", model, engine))
        return
    plain = found.steps[0]
    for steps in found.steps:
        measured = f"{_time(steps.seconds)} per step, {steps.ratio(plain):.2f}× the plain one"
        yield ReportRow(model, engine, f"LoRAs at {found.rows} rows: {named(steps.ranks)}", measured)


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
