"""Puts load on a running server, and reports what it sustains: `python -m loadtest --help`.

python -m loadtest --url http://127.0.0.1:8000 --rate 2 --rate 4 --duration 60 --out load    Poisson arrivals
python -m loadtest --url http://127.0.0.1:8000 --sweep --duration 30 --out load              up to twice the knee
python -m loadtest --url http://127.0.0.1:8000 --users 8 --duration 60 --out load            closed loop of users
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from engines.cli import parse
from engines.files import write_atomically
from loadtest.analysis.results import (
    OUTCOMES,
    LoadLevel,
    LoadTestSummary,
    MeasuredLoad,
    Outcome,
    RequestRecord,
)
from loadtest.analysis.sweep import died, knee_text
from loadtest.client import LoadTestError
from loadtest.command_line import LoadTestOptions
from loadtest.mix import MixError
from loadtest.provenance import begin_run
from loadtest.report.console import comparison_table, metrics_tables
from loadtest.report.page import render_report
from loadtest.runner import load_baseline, measure, summarize_run

_WIDTH = 160  # characters of tables that do not go to a terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, which docs/load-testing.md explains."""
    words = list(sys.argv[1:] if argv is None else argv)
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    options = parse(LoadTestOptions, words, prog="python -m loadtest")
    try:
        summary, loads = _run(options, ["python", "-m", "loadtest", *words])
    except (LoadTestError, MixError, OSError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print(f"stopped: requests that ended are in {options.out / 'requests.jsonl'}", soft_wrap=True)
        return 130
    write_atomically(options.out / "summary.json", summary.model_dump_json(indent=1).encode())
    write_atomically(options.out / "report.html", render_report(summary, loads).encode())
    _print_results(console, summary)
    console.print(f"report: {options.out / 'report.html'}", highlight=False, soft_wrap=True)
    if died(summary.points):
        return 2
    return int(any(one.regressed for one in summary.compared))


def _run(options: LoadTestOptions, command: list[str]) -> tuple[LoadTestSummary, list[MeasuredLoad]]:
    provenance = begin_run(command)
    baseline = load_baseline(options, options.baseline) if options.baseline else None
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "requests.jsonl").open("w", encoding="utf-8") as file, RequestLog(file) as log:
        run = asyncio.run(measure(options, provenance, log))
    return summarize_run(options, run, baseline), run.loads


class RequestLog:
    """Writes each request to a file as it ends, and shows a progress bar for each load on a terminal."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._counts: Counter[Outcome] = Counter()
        console = Console(stderr=True)
        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[counts]}", markup=False))
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)

    def __enter__(self) -> RequestLog:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin_load(self, load: LoadLevel) -> Callable[[float], None]:
        """Add a bar for `load`; returns the function that moves it to some seconds into the load."""
        self._counts.clear()
        task = self._progress.add_task(load.label, total=load.end, counts="")

        def on_progress(at: float) -> None:
            counts = ", ".join(f"{self._counts[outcome]} {outcome}" for outcome in OUTCOMES if self._counts[outcome])
            self._progress.update(task, completed=min(at, load.end), counts=counts)

        return on_progress

    def on_request(self, request: RequestRecord) -> None:
        """Write and count a request that has ended."""
        self._counts[request.outcome] += 1
        self._file.write(request.model_dump_json() + "\n")


def _print_results(console: Console, summary: LoadTestSummary) -> None:
    for table in metrics_tables(summary, console):
        console.print(table, crop=False)
    console.print("".join(knee_text(summary.points, summary.knee)), highlight=False, soft_wrap=True)
    for note in summary.notes:
        console.print(escape(note), style="yellow", highlight=False, soft_wrap=True)
    if summary.baseline is not None:
        console.print(comparison_table(summary), crop=False)


if __name__ == "__main__":
    sys.exit(main())
