"""Which stages are run for which models and backends, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from benchmarks import models
from benchmarks.gpu.bench import GpuBench, first_line
from benchmarks.gpu.figures import Built, Figures
from benchmarks.gpu.measure import measure_decoding, measure_loras, measure_rows, measure_serving, measure_single
from benchmarks.gpu.options import LOADING, GpuBenchCommand
from benchmarks.gpu.results_file import PYTORCH, Stage, pytorch_at, trace_name
from benchmarks.inprocess import Served
from benchmarks.models import BenchmarkModel, checkpoint_of
from engines.backends.available import precision_of, unavailable_reason
from engines.backends.registry import BACKENDS, ON_CPU
from engines.manifest import Manifest

_SERVED: tuple[Stage, ...] = ("rows", "single", "serve")  # share an executor; the first is traced, and ends the trace


def measure_all(bench: GpuBench, benchmark_models: Sequence[BenchmarkModel]) -> None:
    """Run all stages: first those that others are compared with, last what takes longest."""
    if bench.due("peak"):
        bench.measure("peak", "", "", _peak)
    for model in benchmark_models:
        measure_torch(bench, model, "torch")
        measure_batches(bench, model, "batch")
    for model in benchmark_models:
        for backend in _backends(bench.options, model):
            measure_engine(bench, model, backend)
    for model in benchmark_models:
        for backend in _backends(bench.options, model):
            if bench.due("lora", model.name, backend):
                bench.measure("lora", model.name, backend, partial(measure_loras, model, backend, bench.options))
    for model in benchmark_models:
        measure_torch(bench, model, "compile")
        measure_batches(bench, model, "compile_batch")


def measure_torch(bench: GpuBench, model: BenchmarkModel, stage: Stage) -> None:
    """One image at a time in PyTorch."""
    if not bench.due(stage, model.name, PYTORCH):
        return
    options = bench.options

    def make() -> Figures:
        from benchmarks.gpu import torch_bench  # noqa: PLC0415 - seconds of imports, and only where torch is

        measure = torch_bench.measure_compiled if stage == "compile" else torch_bench.measure_eager
        return measure(checkpoint_of(model), options.steps, options.runs)

    bench.measure(stage, model.name, PYTORCH, make)


def measure_batches(bench: GpuBench, model: BenchmarkModel, stage: Stage) -> None:
    """PyTorch at each number of rows, each a stage of its own: one may not fit into memory."""
    for rows in bench.options.rows:
        if bench.due(stage, model.name, pytorch_at(rows)):
            bench.measure(stage, model.name, pytorch_at(rows), partial(_batch, bench, model, stage, rows))


def _batch(bench: GpuBench, model: BenchmarkModel, stage: Stage, rows: int) -> Figures:
    from benchmarks.gpu import torch_bench  # noqa: PLC0415 - seconds of imports, and only where torch is

    return torch_bench.measure_batch(checkpoint_of(model), rows, bench.options, compiled=stage == "compile_batch")


def measure_engine(bench: GpuBench, model: BenchmarkModel, backend: str) -> None:
    """Run all stages of a bundle on a backend."""
    due = [stage for stage in (*_SERVED, "decode") if bench.due(stage, model.name, backend)]
    if not _built(bench, model, backend, wanted=bool(due)):
        bench.fail(due, model.name, backend, "the bundle is missing")
        return
    if served := [stage for stage in _SERVED if stage in due]:
        _measure_served(bench, model, backend, served)
    if "decode" in due and backend in ON_CPU:
        bench.fail(["decode"], model.name, backend, "a CPU decodes between steps in any case")
    elif "decode" in due:
        bench.measure("decode", model.name, backend, lambda: measure_decoding(model, backend, bench.options))


def _built(bench: GpuBench, model: BenchmarkModel, backend: str, *, wanted: bool) -> bool:
    """Build the bundle if it is wanted and missing. Returns whether it is there."""
    rows = bench.options.rows
    kept = models.is_built(model, backend, rows)
    if not (bench.due("build", model.name, backend) or (wanted and not kept)):
        return kept

    def make() -> Figures:
        manifest = models.build(model, backend, rows)
        precision, size = precision_of(manifest, backend), str(manifest.resolutions[0])
        return Built(precision=precision, rows=manifest.rows, size=size, kept=kept)

    return bench.measure("build", model.name, backend, make, needs=0 if kept else None)


def _measure_served(bench: GpuBench, model: BenchmarkModel, backend: str, stages: list[Stage]) -> None:
    """Run the stages that share an executor. After a failed stage the others have a new one."""
    left = list(stages)
    while left:
        needed = LOADING + min(bench.options.needs(stage) for stage in left)
        if not bench.budget.fits(needed):
            note = f"with loading engines it needs about {needed:.0f} s, {bench.budget.left:.0f} s were left"
            bench.fail(left, model.name, backend, note)
            return
        try:
            _serve_until_failure(bench, model, backend, left)
        except Exception as error:  # whatever a library raises, the other models and backends can still run
            bench.fail(left, model.name, backend, first_line(error))
            return


def _serve_until_failure(bench: GpuBench, model: BenchmarkModel, backend: str, left: list[Stage]) -> None:
    """Run the stages of `left` in one executor, and take them out, up to one that fails."""
    trace = bench.options.out / trace_name(model.name, backend) if left[0] == "rows" else None
    with Served(model.bundle, backend, threads=bench.options.threads, trace=trace) as session:
        sound = True
        while left and sound:
            stage = left.pop(0)
            skipped = not bench.budget.fits(bench.options.needs(stage))
            sound = bench.measure(stage, model.name, backend, _maker(stage, session, bench, backend)) or skipped


def _maker(stage: Stage, session: Served, bench: GpuBench, backend: str) -> Callable[[], Figures]:
    if stage == "rows":
        return lambda: measure_rows(session, bench.options, bench.budget, on_host=backend in ON_CPU)
    if stage == "single":
        return lambda: measure_single(session, bench.options, backend)
    return lambda: measure_serving(session, bench.options)


def _peak() -> Figures:
    from benchmarks.gpu import torch_bench  # noqa: PLC0415 - seconds of imports, and only where torch is

    return torch_bench.measure_peak()


def find_models(options: GpuBenchCommand) -> list[BenchmarkModel]:
    """The models to measure. Raises EngineError for a missing one."""
    folder = options.out / "models"
    if options.bundle is None:
        return [models.find_model(model, folder) for model in options.model or ("small",)]
    named = [models.find_model(model, folder) for model in options.model]
    checkpoint = named[0].checkpoint if named else None
    return [BenchmarkModel(Manifest.read(options.bundle).name, checkpoint, options.bundle, given=True)]


def _backends(options: GpuBenchCommand, model: BenchmarkModel) -> list[str]:
    """The backends given; otherwise the GPU's that run here, or else one of the CPU's."""
    if options.backends:
        return list(options.backends)
    builds = Manifest.read(model.bundle).builds if model.given else BACKENDS
    running = [backend for backend in BACKENDS if unavailable_reason(backend) is None]
    on_gpu = [backend for backend in running if backend not in ON_CPU and backend in builds]
    on_cpu = [backend for backend in running if backend in ON_CPU]
    return on_gpu or sorted(on_cpu, key=lambda backend: backend not in builds)[:1]
