"""The calls that are to be made: which stages each would measure, by guesses of their time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.gpu.options import LOADING, GpuBenchCommand
from benchmarks.gpu.results_file import Stage
from benchmarks.models import BenchmarkModel

_SERVED: tuple[Stage, ...] = ("rows", "single", "serve", "decode")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the benchmark."""

    seconds: float
    stages: tuple[str, ...]


def calls(options: GpuBenchCommand, models: Sequence[BenchmarkModel], backends: Sequence[str]) -> list[Call]:
    """All stages in their order, in calls of at most the budget. A stage that alone is longer has a call of its own."""
    made: list[Call] = []
    taken, names = 0.0, list[str]()
    for name, seconds in _stages(options, models, backends):
        if names and taken + seconds > options.budget:
            made.append(Call(taken, tuple(names)))
            taken, names = 0.0, []
        taken += seconds
        names.append(name)
    return [*made, Call(taken, tuple(names))] if names else made


def _stages(
    options: GpuBenchCommand, models: Sequence[BenchmarkModel], backends: Sequence[str]
) -> Iterator[tuple[str, float]]:
    if options.wants("peak"):
        yield "peak", options.needs("peak")
    for model in models:
        yield from _torch(options, model, "torch", "batch")
    for model in models:
        for backend in backends:
            if options.wants("build"):
                yield f"build {model.name} {backend}", 0 if model.given else options.needs("build")
            served = [stage for stage in _SERVED if options.wants(stage)]
            for stage in served:
                yield f"{stage} {model.name} {backend}", options.needs(stage) + LOADING * (stage == served[0])
    if options.wants("lora"):
        yield from ((f"lora {model.name} {backend}", options.needs("lora")) for model in models for backend in backends)
    for model in models:
        yield from _torch(options, model, "compile", "compile_batch")


def _torch(options: GpuBenchCommand, model: BenchmarkModel, single: Stage, batch: Stage) -> Iterator[tuple[str, float]]:
    if options.wants(single):
        yield f"{single} {model.name}", options.needs(single)
    if options.wants(batch):
        for rows in options.rows:
            yield f"{batch} {model.name} {rows} rows", options.needs(batch)
