"""Simulates 8 to 512 servers behind a balancer: at which load p99 breaks, after losses, and with an autoscaler.

python -m benchmarks.cluster.simulation --out cluster.json --figure scaling.svg
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from pydantic import Field, PositiveInt
from pydantic_settings import SettingsConfigDict
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.cli import complain, table_console
from benchmarks.cluster.curve import ASSUMED, StepCurve
from benchmarks.cluster.figure import figure_svg, load_line, loss_line, scaling_lines
from benchmarks.cluster.results import (
    LIMIT,
    Break,
    LoadPoint,
    LossPoint,
    ScalingPoint,
    SimulationResults,
    break_load,
    mean_p99,
)
from benchmarks.cluster.studies import Point, Study, Task
from benchmarks.cluster.workload import MIX
from engines.cli import CommandLine, parse
from engines.files import write_atomically
from loadtest.provenance import Run, begin_run, now

_PROGRAM = "python -m benchmarks.cluster.simulation"


class SimulationCommand(CommandLine):
    """Simulate 8 to 512 servers behind a balancer, from the step curve of one GPU.

    python -m benchmarks.cluster.simulation --out cluster.json --figure scaling.svg

    Nothing is measured: docs/scaling.md lists what is assumed. It takes minutes, on as many processes as cores.
    """

    model_config = SettingsConfigDict(cli_prog_name=_PROGRAM)

    out: Path = Field(description="JSON file to write the results to")
    figure: Path | None = Field(None, description="SVG file to draw them in")
    curve: Path = Field(ASSUMED, description="JSON file with the step curve of a GPU; without one, an assumed curve")
    seeds: PositiveInt = Field(3, description="runs of each point, each with other arrivals")
    jobs: PositiveInt = Field(len(os.sched_getaffinity(0)), description="processes at a time")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(SimulationCommand, words)
    run = begin_run([*_PROGRAM.split(), *words])
    try:
        study = Study(StepCurve.read(options.curve), range(options.seeds))
        results = simulate_all(study, run, jobs=options.jobs)
        write_atomically(options.out, results.model_dump_json(indent=1).encode())
        if options.figure:
            write_atomically(options.figure, figure_svg(results).encode())
    except (OSError, ValueError) as error:
        complain(error)
        return 2
    for table in tables(results):
        table_console(120).print(table)
    return 0


def simulate_all(study: Study, run: Run, *, jobs: int) -> SimulationResults:
    """Run every task of `study`, `jobs` at a time."""
    points = list(_points(list(study.tasks()), jobs))
    return SimulationResults(
        run=run.model_copy(update={"ended": now()}),
        curve=study.curve,
        mix=MIX,
        capacity=study.rate,
        loads=tuple(point for point in points if isinstance(point, LoadPoint)),
        losses=tuple(point for point in points if isinstance(point, LossPoint)),
        scaling=tuple(point for point in points if isinstance(point, ScalingPoint)),
    )


def _points(tasks: Sequence[Task], jobs: int) -> Iterator[Point]:
    if jobs == 1:
        yield from _track(map(_do, tasks), len(tasks))
        return
    # Not forked: the parent may have threads of libraries by now.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from _track(pool.map(_do, tasks), len(tasks))


def _do(task: Task) -> Point:
    return task()


def _track(points: Iterable[Point], total: int) -> Iterable[Point]:
    console = Console(stderr=True)
    return track(points, "simulating", total, console=console, disable=not console.is_terminal)


def tables(results: SimulationResults) -> Iterator[Table]:
    """Where p99 breaks, for each cluster, loss and autoscaler."""
    yield _break_table(results)
    yield _loss_table(results)
    yield _scaling_table(results)


def _break_table(results: SimulationResults) -> Table:
    made = Table(
        "GPUs", "arrivals", "balancer", f"p99 is {LIMIT:g} times an idle server's at a load of", "p99 at 0.7, 0.8, 0.9"
    )
    for size, pattern, balancer in dict.fromkeys((one.size, one.pattern, one.balancer) for one in results.loads):
        line = load_line(results, size, balancer, pattern)
        shown = [_times(mean_p99(runs)) for load, runs in line if load in {0.7, 0.8, 0.9}]
        made.add_row(str(size), pattern, balancer, _break(break_load(line)), ", ".join(shown))
    return made


def _loss_table(results: SimulationResults) -> Table:
    made = Table(
        "GPUs", "lost", f"p99 after the loss is {LIMIT:g} times an idle server's at a load before of", "requests lost"
    )
    for size, lost in dict.fromkeys((one.size, one.lost_servers) for one in results.losses):
        line = loss_line(results, size, lost)
        without = sum(run.lost for _, runs in line for run in runs)
        made.add_row(str(size), str(lost), _break(break_load(line)), str(without))
    return made


def _scaling_table(results: SimulationResults) -> Table:
    made = Table("signal", "target", "fewer at a time", "p99 by seconds until a server is ready", "servers")
    for (signal, target, shrink), points in scaling_lines(results):
        shown = [f"{point.scaling.start:g} s: {_times(mean_p99(point.runs))}" for point in points]
        servers = [f"{point.servers:.1f}" for point in points]
        made.add_row(signal, f"{target:g}", f"{shrink:.0%}", ", ".join(shown), ", ".join(servers))
    return made


def _break(found: Break | None) -> str:
    return f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})" if found else "none of those tried"


def _times(value: float | None) -> str:
    return f"{value:.1f}×" if value is not None else "no image for 1 %"


if __name__ == "__main__":
    sys.exit(main())
