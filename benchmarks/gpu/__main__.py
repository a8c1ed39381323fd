"""Measures the server on this machine, and PyTorch for comparison."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence

from rich.console import Console

from benchmarks.cli import complain, table_console
from benchmarks.gpu.bench import GpuBench
from benchmarks.gpu.options import GpuBenchCommand
from benchmarks.gpu.plan import Call, calls
from benchmarks.gpu.report import table
from benchmarks.gpu.results_file import ResultsFile
from benchmarks.gpu.stages import find_models, measure_all
from engines.cli import parse
from engines.errors import EngineError
from loadtest.provenance import begin_run

_WIDTH = 160
_PLANNED = ("onnxruntime_cuda",)  # where no backend is named, as a plan is made on any machine


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(GpuBenchCommand, words)
    console = table_console(_WIDTH)
    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        benchmark_models = find_models(options)
        if options.plan:
            _print_plan(console, calls(options, benchmark_models, options.backends or _PLANNED), words)
            return 0
        options.out.mkdir(parents=True, exist_ok=True)
        results = ResultsFile.open(options.out, begin_run(["python", "-m", "benchmarks.gpu", *words]))
    except (EngineError, ValueError) as error:
        complain(error)
        return 1
    bench = GpuBench(options, results, console)
    measure_all(bench, benchmark_models)
    results.close()
    console.print(table(results.record))
    console.print(f"raw results: {results.path}", highlight=False, soft_wrap=True)
    return 0


def _print_plan(console: Console, planned: Sequence[Call], words: Sequence[str]) -> None:
    """The same command each time: a call continues where the one before ended."""
    command = shlex.join(["python", "-m", "benchmarks.gpu", *(word for word in words if word != "--plan")])
    for number, call in enumerate(planned, start=1):
        console.print(f"{number}. about {call.seconds:.0f} s: {command}", highlight=False, soft_wrap=True)
        console.print(f"   {', '.join(call.stages)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
