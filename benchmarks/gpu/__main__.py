"""Measures the server on this machine, and PyTorch for comparison."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from benchmarks.cli import complain, table_console
from benchmarks.gpu.bench import GpuBench
from benchmarks.gpu.options import GpuBenchCommand
from benchmarks.gpu.report import table
from benchmarks.gpu.results_file import ResultsFile
from benchmarks.gpu.stages import find_models, measure_all
from engines.cli import parse
from engines.errors import EngineError
from loadtest.provenance import begin_run

_WIDTH = 160


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(GpuBenchCommand, words)
    console = table_console(_WIDTH)
    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        benchmark_models = find_models(options)
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


if __name__ == "__main__":
    sys.exit(main())
