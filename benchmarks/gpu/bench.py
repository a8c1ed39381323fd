"""Measures what this machine makes of the server, and PyTorch beside it: one call, one table, one JSON.

python -m benchmarks.gpu.bench --out DIR                          everything that runs here, for the small model
python -m benchmarks.gpu.bench --out DIR --only rows,serve        some stages, measured anew
python -m benchmarks.gpu.bench --out DIR --bundle engines/demo    a bundle that is there already, on any machine

Results are kept as soon as they are there, in DIR/<device>-<date>.json. A second call goes on where the first ended:
what the file holds is measured again only when --only names it.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from benchmarks import models
from benchmarks.gpu.figures import (
    POLICIES,
    Built,
    Decoding,
    Figures,
    Full,
    Latencies,
    Load,
    Rows,
    Serving,
    rate,
    summary,
)
from benchmarks.gpu.report import table
from benchmarks.gpu.results_file import STAGES, Book, Result, Stage
from benchmarks.inprocess import Saturated, Served
from benchmarks.models import Subject, checkpoint_of
from benchmarks.spans import (
    STEPS,
    Span,
    by_company,
    host_per_step,
    idle_share,
    inside,
    rows_of,
    steps_in,
    waiting_share,
)
from engines.backends.available import precision_of, unavailable_reason
from engines.backends.registry import BACKENDS, ON_CPU
from engines.errors import EngineError
from engines.manifest import Manifest
from loadtest.arrivals import Arrival, poisson
from loadtest.provenance import begin_run
from loadtest.statistics import Spread

_log = logging.getLogger(__name__)
_SERVED: tuple[Stage, ...] = ("rows", "single", "serve")  # over one executor; the first is traced, and ends the trace
_PYTORCH = "PyTorch"
_LOADING = 45  # seconds: a guess at loading engines and warming them up
_WIDTH = 160


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for."""

    out: Path
    models: tuple[str, ...]
    bundle: Path | None
    backends: tuple[str, ...]
    only: tuple[Stage, ...]
    skip_torch: bool
    steps: tuple[int, ...]
    rows: tuple[int, ...]
    runs: int
    seconds: float
    serve_seconds: float
    serve_rows: int
    loads: tuple[float, ...]
    slo: float
    seed: int
    threads: int
    budget: float

    @property
    def mix(self) -> tuple[int, int]:
        return min(self.steps), max(self.steps)

    def wants(self, stage: Stage) -> bool:
        if self.skip_torch and stage in {"torch", "compile"}:
            return False
        return stage in self.only if self.only else True

    def needs(self, stage: Stage) -> float:
        """Seconds that a stage may take on a GPU, engines loaded: guesses, by which the budget is kept."""
        serving = self.serve_seconds * (1 + len(POLICIES) * len(self.loads)) * 1.2
        return {
            "peak": 10.0,
            "torch": 60.0,
            "build": 240.0,
            "rows": self.seconds * len(self.rows) * 1.5,
            "single": 20.0,
            "serve": serving,
            "decode": 2 * (_LOADING + self.seconds * 1.5),
            "compile": 300.0,
        }[stage]


class Budget:
    """The time that a call may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(self._end - time.monotonic(), 0.0)

    def fits(self, seconds: float) -> bool:
        return seconds <= self.left


class Bench:
    """Runs stages: those that are due, while there is time, each to a result of its own."""

    def __init__(self, options: Options, book: Book, console: Console) -> None:
        self.options = options
        self.budget = Budget(options.budget)
        self.book = book
        self._console = console

    def due(self, stage: Stage, model: str = "", engine: str = "") -> bool:
        found = self.book.record.find(stage, model, engine)
        kept = not self.options.only and found is not None and found.figures is not None
        return self.options.wants(stage) and not kept

    def measure(
        self, stage: Stage, model: str, engine: str, make: Callable[[], Figures], *, needs: float | None = None
    ) -> bool:
        """Keep what `make` finds, or why it found nothing; whether it found something."""
        name = " ".join(filter(None, (stage, model, engine)))
        needed = self.options.needs(stage) if needs is None else needs
        if not self.budget.fits(needed):
            self._put(stage, model, engine, note=f"it needs about {needed:.0f} s, {self.budget.left:.0f} were left")
            return False
        self._console.print(f"{name} …", style="dim")
        began = time.monotonic()
        try:
            figures = make()
        except Exception as error:  # whatever a library raises, the other stages can still be measured
            if not isinstance(error, EngineError):
                _log.error("%s failed", name, exc_info=error)
            self._put(stage, model, engine, note=_first_line(error), seconds=time.monotonic() - began)
            return False
        self._put(stage, model, engine, figures=figures, seconds=time.monotonic() - began)
        return True

    def fail(self, stages: Sequence[Stage], model: str, engine: str, note: str) -> None:
        for stage in stages:
            self._put(stage, model, engine, note=note)

    def _put(
        self,
        stage: Stage,
        model: str,
        engine: str,
        *,
        figures: Figures | None = None,
        note: str = "",
        seconds: float = 0.0,
    ) -> None:
        run = len(self.book.record.runs) - 1
        result = Result(
            stage=stage, model=model, engine=engine, run=run, seconds=round(seconds, 2), figures=figures, note=note
        )
        self.book.put(result)
        if note:
            self._console.print(f"{stage} {model} {engine}: not measured: {escape(note)}", style="yellow")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = _options(words)
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        subjects = _subjects(options)
        book = Book.open(options.out, begin_run(["python", "-m", "benchmarks.gpu.bench", *words]))
    except (EngineError, ValueError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    bench = Bench(options, book, console)
    measure_all(bench, subjects)
    book.close()
    console.print(table(book.record))
    console.print(f"raw: {book.path}", highlight=False, soft_wrap=True)
    return 0


def measure_all(bench: Bench, subjects: Sequence[Subject]) -> None:
    """Every stage, those first that the others are compared with, and last what takes longest."""
    if bench.due("peak"):
        bench.measure("peak", "", "", _peak)
    for subject in subjects:
        measure_torch(bench, subject, "torch")
    for subject in subjects:
        for backend in _backends(bench.options, subject):
            measure_engine(bench, subject, backend)
    for subject in subjects:
        measure_torch(bench, subject, "compile")


def measure_torch(bench: Bench, subject: Subject, stage: Stage) -> None:
    """One picture at a time in PyTorch."""
    if not bench.due(stage, subject.name, _PYTORCH):
        return
    options = bench.options

    def make() -> Figures:
        from benchmarks.gpu import torch_bench  # noqa: PLC0415 - seconds of imports, and only where torch is

        measure = torch_bench.measure_compiled if stage == "compile" else torch_bench.measure_eager
        return measure(checkpoint_of(subject), options.steps, options.runs)

    bench.measure(stage, subject.name, _PYTORCH, make)


def measure_engine(bench: Bench, subject: Subject, backend: str) -> None:
    """Everything that is measured of a bundle on a backend."""
    due = [stage for stage in (*_SERVED, "decode") if bench.due(stage, subject.name, backend)]
    if not _built(bench, subject, backend, wanted=bool(due)):
        bench.fail(due, subject.name, backend, "the bundle is missing")
        return
    if served := [stage for stage in _SERVED if stage in due]:
        _measure_served(bench, subject, backend, served)
    if "decode" in due and backend in ON_CPU:
        bench.fail(["decode"], subject.name, backend, "a host decodes between steps in any case")
    elif "decode" in due:
        bench.measure("decode", subject.name, backend, lambda: measure_decoding(subject, backend, bench.options))


def _built(bench: Bench, subject: Subject, backend: str, *, wanted: bool) -> bool:
    """Whether the bundle is there. Where it is wanted and is not, it is built."""
    rows = bench.options.rows
    kept = models.is_built(subject, backend, rows)
    if not (bench.due("build", subject.name, backend) or (wanted and not kept)):
        return kept

    def make() -> Figures:
        manifest = models.build(subject, backend, rows)
        precision, size = precision_of(manifest, backend), str(manifest.resolutions[0])
        return Built(precision=precision, rows=manifest.rows, size=size, kept=kept)

    return bench.measure("build", subject.name, backend, make, needs=0 if kept else None)


def _measure_served(bench: Bench, subject: Subject, backend: str, stages: list[Stage]) -> None:
    """The stages that share an executor."""
    needed = _LOADING + min(bench.options.needs(stage) for stage in stages)
    if not bench.budget.fits(needed):
        note = f"with engines to load it needs about {needed:.0f} s, {bench.budget.left:.0f} were left"
        bench.fail(stages, subject.name, backend, note)
        return
    trace = bench.options.out / "trace.json" if "rows" in stages else None
    left = list(stages)
    try:
        with Served(subject.bundle, backend, threads=bench.options.threads, trace=trace) as session:
            while left:
                stage = left.pop(0)
                bench.measure(stage, subject.name, backend, _maker(stage, session, bench, backend))
    except EngineError as error:
        bench.fail(left, subject.name, backend, _first_line(error))


def _maker(stage: Stage, session: Served, bench: Bench, backend: str) -> Callable[[], Figures]:
    if stage == "rows":
        return lambda: measure_rows(session, bench.options, bench.budget, on_host=backend in ON_CPU)
    if stage == "single":
        return lambda: measure_single(session, bench.options, backend)
    return lambda: measure_serving(session, bench.options)


def measure_single(session: Served, options: Options, backend: str) -> Latencies:
    """One guided picture at a time, from submitting it to hearing that it is done."""
    broken = session.broken
    first = session.draw(min(options.steps))
    by_steps = {
        steps: Spread(values=tuple(session.draw(steps) for _ in range(options.runs))) for steps in options.steps
    }
    return Latencies(
        precision=precision_of(session.manifest, backend),
        first=first,
        by_steps=by_steps,
        broken=session.broken - broken,
    )


def measure_rows(session: Served, options: Options, budget: Budget, *, on_host: bool) -> Rows:
    """The pipeline full, at each number of rows in turn, in a closed loop."""
    broken, steps = session.broken, min(options.steps)
    filled: dict[int, Saturated] = {}
    asked = [rows for rows in options.rows if rows <= session.manifest.max_rows]
    for rows in asked:
        if not filled or budget.fits(options.seconds * 1.5):
            filled[rows] = session.saturate(rows, repeat(steps), seconds=options.seconds)
    spans = session.take_spans()
    return Rows(
        steps=steps,
        points=tuple(_full(rows, saturated, spans, on_host=on_host) for rows, saturated in filled.items()),
        curve=dict(session.step_times.curves()[session.manifest.resolutions[0], "full"]),
        left_out=tuple(rows for rows in asked if rows not in filled),
        broken=session.broken - broken,
    )


def _full(rows: int, saturated: Saturated, spans: Sequence[Span], *, on_host: bool) -> Full:
    """What the trace says of the time in which steps were of `rows`. Where the host computes, its work is not told."""
    seen = inside(spans, saturated.window)
    alone, beside = by_company([span for span in seen if span.track != STEPS or rows_of(span) == rows])
    return Full(
        rows=rows,
        images=len(saturated.moments),
        images_per_second=rate(saturated.moments),
        step=summary([*alone, *beside]),
        step_alone=summary(alone),
        step_beside_decode=summary(beside),
        idle_share=idle_share(steps_in(seen)),
        host_per_step=None if on_host else host_per_step(seen),
        waiting_share=None if on_host else waiting_share(seen, saturated.window),
    )


def measure_serving(session: Served, options: Options) -> Serving:
    """The same callers, coming by chance, batched by step and by request."""
    broken, rows = session.broken, min(options.serve_rows, session.manifest.max_rows)
    session.draw(min(options.mix))
    unloaded = {steps: float(np.median([session.draw(steps) for _ in range(3)])) for steps in options.mix}
    full = session.saturate(rows, _mixed(options), seconds=options.serve_seconds)
    capacity = rate(full.moments)
    return Serving(
        rows=rows,
        capacity=capacity,
        unloaded=unloaded,
        slo=options.slo,
        seed=options.seed,
        loads=tuple(_load(session, options, share, rows=rows, capacity=capacity) for share in options.loads),
        broken=session.broken - broken,
    )


def measure_decoding(subject: Subject, backend: str, options: Options) -> Decoding:
    """Full at the most rows, with decodes beside the steps and between them."""
    found: dict[bool, float] = {}
    rows = broken = 0
    for beside in (True, False):
        with Served(subject.bundle, backend, threads=options.threads, overlap_decode=beside) as session:
            rows = min(max(options.rows), session.manifest.max_rows)
            full = session.saturate(rows, repeat(min(options.steps)), seconds=options.seconds)
            found[beside] = rate(full.moments)
            broken += session.broken
    return Decoding(rows=rows, beside=found[True], between=found[False], broken=broken)


def _mixed(options: Options) -> Iterator[int]:
    """Steps of one caller after another, without end."""
    dice = np.random.default_rng(options.seed)
    while True:
        yield int(dice.integers(*options.mix, endpoint=True))


def _load(session: Served, options: Options, share: float, *, rows: int, capacity: float) -> Load:
    per_second, seconds = share * capacity, options.serve_seconds
    arrivals = poisson(rate=per_second, seconds=seconds, steps=options.mix, seed=options.seed) or (
        Arrival(0.0, min(options.mix)),
    )
    latencies = {policy: session.replay(arrivals, rows=rows, by_request=policy == "by request") for policy in POLICIES}
    return Load(
        share=share,
        rate=per_second,
        seconds=seconds,
        steps=tuple(arrival.steps for arrival in arrivals),
        latencies=latencies,
    )


def _peak() -> Figures:
    from benchmarks.gpu import torch_bench  # noqa: PLC0415 - seconds of imports, and only where torch is

    return torch_bench.measure_peak()


def _subjects(options: Options) -> list[Subject]:
    """The models to measure. Raises EngineError for one that is not there."""
    folder = options.out / "models"
    if options.bundle is None:
        return [models.subject(model, folder) for model in options.models or ("small",)]
    named = [models.subject(model, folder) for model in options.models]
    checkpoint = named[0].checkpoint if named else None
    return [Subject(Manifest.read(options.bundle).name, checkpoint, options.bundle, given=True)]


def _backends(options: Options, subject: Subject) -> list[str]:
    """Those asked for; unless any is, those of the GPU that run here, or the first of the CPU's."""
    if options.backends:
        return list(options.backends)
    builds = Manifest.read(subject.bundle).builds if subject.given else BACKENDS
    running = [backend for backend in BACKENDS if unavailable_reason(backend) is None]
    on_gpu = [backend for backend in running if backend not in ON_CPU and backend in builds]
    on_cpu = [backend for backend in running if backend in ON_CPU]
    return on_gpu or sorted(on_cpu, key=lambda backend: backend not in builds)[:1]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _options(words: Sequence[str]) -> Options:
    given = _parser().parse_args(words)
    backends = () if "auto" in given.backend else tuple(dict.fromkeys(given.backend))
    return Options(
        out=given.out,
        models=tuple(given.model),
        bundle=given.bundle,
        backends=backends,
        only=given.only,
        skip_torch=given.skip_torch,
        steps=given.steps,
        rows=given.rows,
        runs=given.runs,
        seconds=given.seconds,
        serve_seconds=given.serve_seconds,
        serve_rows=given.serve_rows,
        loads=tuple(percent / 100 for percent in given.loads),
        slo=given.slo,
        seed=given.seed,
        threads=given.threads,
        budget=given.budget,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_what(parser.add_argument_group("what is measured"))
    _add_how(parser.add_argument_group("how"))
    return parser


def _add_what(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where the JSON goes, and the models that are made")
    add(
        "--model",
        nargs="+",
        default=[],
        metavar="MODEL",
        help=f"{' or '.join(models.ARCHITECTURES)}, with random weights, or a diffusers folder (default: small)",
    )
    add("--bundle", type=Path, help="a bundle to take as it is; --model then says what PyTorch loads beside it")
    add(
        "--backend",
        nargs="+",
        default=["auto"],
        choices=("auto", *BACKENDS),
        help="auto takes all of the GPU's that run here, or one of the CPU's",
    )
    add("--only", type=_stages, default=(), metavar="STAGE,…", help=f"of {','.join(STAGES)}; measured anew")
    add("--skip-torch", action="store_true", help="run no pictures in PyTorch")


def _add_how(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    counts = "default: %(default)s"
    add("--steps", type=_counts, default=(20, 50), metavar="N,N", help="steps of a picture (default: 20,50)")
    add("--rows", type=_counts, default=(2, 4, 8, 16, 32, 64), metavar="N,N", help="(default: 2,4,8,16,32,64)")
    add("--runs", type=_positive, default=10, help=f"pictures for each latency ({counts})")
    add("--seconds", type=_duration, default=8, help=f"at each number of rows ({counts})")
    add("--serve-seconds", type=_duration, default=20, help=f"in which callers come, for each load ({counts})")
    add("--serve-rows", type=_positive, default=16, help=f"at most in a step, under callers ({counts})")
    add("--loads", type=_counts, default=(50, 80, 95), metavar="N,N", help="per cent of saturation (default: 50,80,95)")
    add("--slo", type=_duration, default=5, help=f"what callers accept, in latencies of an idle server ({counts})")
    add("--seed", type=int, default=0, help=f"of the callers ({counts})")
    add("--threads", type=int, default=0, help="of engines on a CPU; 0 takes one per core")
    add("--budget", type=_duration, default=float("inf"), metavar="SECONDS", help="skip what no longer fits into it")


def _stages(text: str) -> tuple[Stage, ...]:
    words = text.split(",")
    if unknown := set(words) - set(STAGES):
        raise argparse.ArgumentTypeError(f"there is no stage {', '.join(sorted(unknown))}: {', '.join(STAGES)}")
    return tuple(stage for stage in STAGES if stage in words)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(word) for word in text.split(",")}))


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def _duration(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
