"""States the quality of each position of `cache`: how often the demo model still draws what was asked for, and how much
its images differ from those without the step cache."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from pydantic import Field, PositiveInt
from pydantic_settings import SettingsConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.cli import complain
from benchmarks.inprocess import Served
from benchmarks.quality.measure import measure, sheet
from benchmarks.quality.results import CACHES, QualityResults, page_tables
from engines.cli import CommandLine, RepeatableList, parse
from engines.demo import BUNDLE as DEMO
from engines.demo.check import GUIDANCE
from engines.errors import EngineError
from engines.files import write_atomically
from engines.schedulers import METHODS
from loadtest.provenance import begin_run, now

_PROGRAM = "python -m benchmarks.quality"
_DISTILLED = {"lcm", "tcd"}  # for models that take a few steps, which the demo is not
_KARRAS = "dpmpp_2m_karras"  # of those with other noise levels than their own, the one in widest use
_SCHEDULERS = (*(name for name in METHODS if name not in _DISTILLED), _KARRAS)
_STEPS = (10, 20, 50)
_BEGIN, _END = "<!-- begin of the tables -->\n", "\n<!-- end of the tables -->"


class QualityCommand(CommandLine):
    """Measure what each position of `cache` costs in quality, with the demo model.

    python -m benchmarks.quality --out docs/benchmarks/quality.json --page docs/quality.md --sheet docs/quality.jpg

    Runs in this process, without HTTP. What --out holds already is not measured again, so a run that was stopped goes
    on from there.
    """

    model_config = SettingsConfigDict(cli_prog_name=_PROGRAM)

    out: Path = Field(description="JSON file to write the results to, after each scheduler and number of steps")
    page: Path | None = Field(None, description="Markdown file whose tables are written anew from the results")
    sheet: Path | None = Field(None, description="JPEG file for images side by side: a column of each cache")
    bundle: Path = Field(DEMO, description="folder of a bundle of the demo model")
    backend: str = Field("onnxruntime", description="what runs its engines")
    scheduler: RepeatableList[str] = Field(_SCHEDULERS, description="repeatable")
    steps: RepeatableList[PositiveInt] = Field(_STEPS, description="denoising steps, repeatable")
    prompts: PositiveInt = Field(200, description="how many, each with a seed of its own")
    seed: int = Field(0, ge=0, description="of the first image, and of what the prompts are")
    sheet_prompts: PositiveInt = Field(8, description="rows of the sheet")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(QualityCommand, words)
    try:
        with Served(options.bundle, options.backend) as served:
            results = _measure(served, options, [*_PROGRAM.split(), *words])
            if options.sheet:
                images = sheet(served, "dpmpp_2m", 20, prompts=options.sheet_prompts, seed=options.seed)
                images.save(options.sheet, quality=90)
    except (EngineError, OSError, ValueError) as error:
        complain(error)
        return 2
    if options.page:
        write_page(options.page, results)
    return 0


def write_page(page: Path, results: QualityResults) -> None:
    """Write the tables of the page anew, between its two marks."""
    before, rest = page.read_text().split(_BEGIN)
    _, after = rest.split(_END)
    page.write_text(f"{before}{_BEGIN}{page_tables(results)}{_END}{after}")


def _measure(served: Served, options: QualityCommand, command: list[str]) -> QualityResults:
    results = _begun(served, options, command)
    asked = list(product(options.scheduler, options.steps))
    todo = [one for one in asked if not all((*one, cache) in results.by_key for cache in CACHES)]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("images", total=len(todo) * len(CACHES) * options.prompts)
        for scheduler, steps in todo:
            progress.update(task, description=f"{scheduler}, {steps} steps")
            cells = measure(
                served,
                scheduler,
                steps,
                prompts=options.prompts,
                seed=options.seed,
                on_image=lambda: progress.advance(task),
            )
            kept = [cell for cell in results.cells if (cell.scheduler, cell.steps) != (scheduler, steps)]
            results = results.model_copy(
                update={"cells": (*kept, *cells), "run": results.run.model_copy(update={"ended": now()})}
            )
            write_atomically(options.out, results.model_dump_json(indent=1).encode())
    return results


def _begun(served: Served, options: QualityCommand, command: list[str]) -> QualityResults:
    """What an earlier run left, or nothing yet. Raises ValueError where that was of something else."""
    fresh = QualityResults(
        run=begin_run(command),
        model=served.manifest.name,
        backend=options.backend,
        prompts=options.prompts,
        guidance=GUIDANCE,
        cells=(),
    )
    if not options.out.exists():
        return fresh
    found = QualityResults.model_validate_json(options.out.read_bytes())
    same = {"model", "backend", "prompts", "guidance"}
    if found.model_dump(include=same) != fresh.model_dump(include=same):
        raise ValueError(f"{options.out} has results of other settings: choose another --out, or remove it")
    return found


if __name__ == "__main__":
    sys.exit(main())
