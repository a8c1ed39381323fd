"""Measures what LoRAs in the batch cost: a step with and without them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt
from pydantic_settings import SettingsConfigDict

from benchmarks import models
from benchmarks.cli import ImageSize, complain, size_of, table_console
from benchmarks.lora.graphs import count_graphs, unet_layers
from benchmarks.lora.report import tables
from benchmarks.lora.results import LoraResults, TimedSteps
from benchmarks.lora.steps import Steps, capacity_of, cases_of, time_steps
from engines.backends.registry import BACKENDS
from engines.cli import CommandLine, Metavar, RepeatableList, parse
from engines.errors import EngineError
from engines.files import write_atomically
from engines.manifest import Manifest, Size
from loadtest.provenance import Run, begin_run, now

_PROGRAM = "python -m benchmarks.lora"
_ROWS = (2, 4, 8, 16)  # of bundles that are built for it


class LoraCommand(CommandLine):
    """Measure what LoRAs in the batch cost: steps of the plain graph, and of that which applies LoRAs.

    python -m benchmarks.lora --out lora.json --bundle DIR      a bundle that was built with --lora-slots
    python -m benchmarks.lora --out lora.json --model small     real architectures, with random weights

    Steps with and without LoRAs take turns, so what else the machine does meets them alike. Operations, bytes and nodes
    are counted from the graphs.
    """

    model_config = SettingsConfigDict(cli_prog_name=_PROGRAM)

    out: Path = Field(description="JSON file to write the results to")
    bundle: Path | None = Field(None, description="a bundle with graphs for LoRAs")
    model: Annotated[str | None, Metavar("M")] = Field(
        None,
        description=f"in place of --bundle: {' or '.join(models.ARCHITECTURES)}, or a diffusers folder; its bundle is "
        "built in the folder of --out",
    )
    backend: RepeatableList[Annotated[str, Field(pattern=f"^({'|'.join(BACKENDS)})$")]] = Field(
        ("onnxruntime",), description=f"repeatable, of {', '.join(BACKENDS)}"
    )
    size: ImageSize | None = Field(None, description="of the timed images (default: the bundle's first)")
    counted_size: ImageSize | None = Field(
        None, description="of the image whose operations are counted (default: as --size)"
    )
    images: PositiveInt = Field(8, description="guided images in a step, each two rows")
    loras: RepeatableList[PositiveInt] = Field((1, 4, 8), description="LoRAs in the step, repeatable")
    rank: RepeatableList[PositiveInt] = Field((4, 16, 32, 64), description="their ranks, repeatable")
    rounds: PositiveInt = Field(5, description="rounds, each with all cases")
    steps: PositiveInt = Field(5, description="steps of each case in a round")
    threads: int = Field(0, ge=0, description="CPU threads of engines on a CPU; 0 takes one per core")
    one_graph: bool = Field(
        False, description="load each graph when it runs, for models of which memory does not hold two"
    )
    timed: bool = Field(True, description="time steps")
    counted: bool = Field(True, description="count operations, bytes and nodes, with one run of each graph")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(LoraCommand, words)
    run = begin_run([*_PROGRAM.split(), *words])
    try:
        found = measure(_bundle(options), options, run)
    except (EngineError, OSError) as error:
        complain(error)
        return 1
    write_atomically(options.out, found.model_dump_json(indent=1).encode())
    console = table_console(140)
    for table in tables(found):
        console.print(table)
    for note in found.notes:
        console.print(f"not measured: {note}", style="yellow", highlight=False, soft_wrap=True)
    return 0


def _bundle(options: LoraCommand) -> Path:
    """The bundle to measure, built if it is missing. Raises EngineError."""
    if (options.bundle is None) == (options.model is None):
        raise EngineError("Name either a --bundle or a --model.")
    if options.bundle:
        return options.bundle
    model = models.with_loras(models.find_model(options.model or "", options.out.parent / "models"))
    models.build(model, options.backend[0], _ROWS, lora=models.LORA_CAPACITY)
    return model.bundle


def measure(bundle: Path, options: LoraCommand, run: Run) -> LoraResults:
    """Time and count the steps of a bundle. What fails of a backend is a note. Raises EngineError."""
    manifest = Manifest.read(bundle)
    capacity = capacity_of(manifest)
    size = size_of(options.size) if options.size else manifest.resolutions[0]
    counted_size = size_of(options.counted_size) if options.counted_size else size
    timed, notes = list[TimedSteps](), list[str]()
    for backend in options.backend if options.timed else ():
        try:
            timed.append(_time(bundle, backend, size, options))
        except EngineError as error:
            notes.append(f"{backend}: {error}")
    ranks = [rank for rank in options.rank if rank <= capacity.rank]
    return LoraResults(
        run=run.model_copy(update={"ended": now()}),
        model=manifest.name,
        layers=len(unet_layers(manifest)),
        slots=capacity.slots,
        rank=capacity.rank,
        pool=capacity.pool_rows * manifest.dims(size)["G"] * 2,
        graphs=count_graphs(bundle, counted_size, ranks) if options.counted else None,
        timed=tuple(timed),
        notes=tuple(notes),
    )


def _time(bundle: Path, backend: str, size: Size, options: LoraCommand) -> TimedSteps:
    steps = Steps(
        bundle, backend, size=size, images=options.images, threads=options.threads, one_graph=options.one_graph
    )
    cases = cases_of(capacity_of(steps.manifest), loras=options.loras, ranks=options.rank, images=options.images)
    return time_steps(steps, backend, cases, rounds=options.rounds, count=options.steps)


if __name__ == "__main__":
    sys.exit(main())
