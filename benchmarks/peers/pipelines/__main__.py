"""Compares with other pipelines on a CPU: images of the same model, one at a time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, PositiveInt, ValidationError
from pydantic_settings import SettingsConfigDict
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.cli import ImageSize, complain, table_console
from benchmarks.peers.pipelines.artifacts import ArtifactBuilder
from benchmarks.peers.pipelines.comparison import PipelineComparison
from benchmarks.peers.pipelines.report import table
from benchmarks.peers.pipelines.results import PipelineResults, PipelineSettings
from benchmarks.peers.pipelines.systems import SYSTEMS, TITLES, System
from engines.cli import CommandLine, RepeatableList, parse
from engines.errors import EngineError
from loadtest.provenance import begin_run

_STEPS = {"256x256": 20, "512x512": 4}
_GUIDANCE = 7.5
_PROMPTS = (
    "a photograph of a lighthouse on a rock in the sea",
    "a lighthouse in the sea on a photograph of a rock",
    "a rock in the sea, a lighthouse on a rock",
    "the sea, a photograph",
)
_WIDTH = 160
_LIST_PACKAGES = (
    "import json, importlib.metadata as m; print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
)
_RELEVANT = re.compile(r"torch|diffusers|transformers|optimum|openvino|nncf|stable.diffusion|numpy|tokenizers")


def _system_name(name: str) -> str:
    if name not in dict(TITLES):
        raise ValueError(f"there is no such system: {', '.join(dict(TITLES))}")
    return name


class PipelinesCommand(CommandLine):
    """Compare with other pipelines on a CPU: images of the same model, one at a time.

    python -m benchmarks.peers.pipelines --out DIR --peers-python VENV/bin/python     all systems
    python -m benchmarks.peers.pipelines --out DIR --only torch-eager openvino        some of them
    python -m benchmarks.peers.pipelines --out DIR --resume                           continue an earlier call

    VENV has the packages in benchmarks/peers/pipelines/requirements.txt. Results go to DIR/peers.json, DIR/peers.md and
    DIR/pictures as they are found. Missing models are made first, which takes minutes and gigabytes.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m benchmarks.peers.pipelines")

    out: Path = Field(description="folder for results")
    models: Path | None = Field(
        None, description="folder for checkpoints, exports and bundles; unless given, OUT/models"
    )
    only: RepeatableList[Annotated[str, AfterValidator(_system_name)]] = Field(
        (), description=f"systems to measure, of {', '.join(dict(TITLES))}"
    )
    peers_python: str = Field(sys.executable, description="interpreter with the packages in requirements.txt")
    size: RepeatableList[ImageSize] = Field(tuple(_STEPS), description="WIDTHxHEIGHT of images, repeatable")
    steps: PositiveInt | None = Field(
        None, description="denoising steps at every size; unless given, 20, and 4 at 512x512"
    )
    repeats: PositiveInt = Field(2, description="images of each measurement")
    rounds: PositiveInt = Field(1, description="measurements of each system; each round has all systems")
    threads: PositiveInt = Field(len(os.sched_getaffinity(0)), description="CPU threads of each system")
    prompt: RepeatableList[str] = Field(
        _PROMPTS, description="prompts, repeatable; image k has prompt k, starting over after the last"
    )
    resume: bool = Field(False, description="keep earlier results in OUT, and measure what is missing")
    prepare: bool = Field(False, description="make missing models, and measure nothing")

    @property
    def systems(self) -> tuple[System, ...]:
        return tuple(system for system in SYSTEMS if not self.only or system.name in self.only)

    @property
    def settings(self) -> PipelineSettings:
        return PipelineSettings(
            sizes={size: self.steps or _STEPS.get(size, max(_STEPS.values())) for size in self.size},
            repeats=self.repeats,
            rounds=self.rounds,
            guidance=_GUIDANCE,
            threads=self.threads,
            prompts=self.prompt,
        )


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(PipelinesCommand, words)
    console = table_console(_WIDTH)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        packages = _packages_of(options.peers_python)
        builder = _builder(options, packages)
        if options.prepare:
            return _prepare(options, builder, console)
        results = _open_results(options)
    except EngineError as error:
        complain(error)
        return 1
    results.runs.append(begin_run(["python", "-m", "benchmarks.peers.pipelines", *words]))
    results.peers_packages = {name: version for name, version in sorted(packages.items()) if _RELEVANT.search(name)}
    comparison = PipelineComparison(options.out, results, builder, python=options.peers_python)
    _measure_all(comparison, options.systems, console)
    for size in options.settings.sizes:
        console.print(table(results, size, TITLES))
    console.print(f"raw results: {options.out / 'peers.json'}", highlight=False, soft_wrap=True)
    return 0


def _measure_all(comparison: PipelineComparison, systems: tuple[System, ...], console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        due = comparison.due(systems)
        bar = progress.add_task("", total=len(due))
        for system, size, number in due:
            progress.update(bar, description=f"{size} {system.name}")
            found = comparison.measure(system, size, number)
            if found.note:
                console.print(f"{size} {system.name}: {escape(found.note)}", style="yellow", soft_wrap=True)
            progress.advance(bar)
    comparison.save()


def _builder(options: PipelinesCommand, packages: dict[str, str]) -> ArtifactBuilder:
    return ArtifactBuilder(
        options.models or options.out / "models",
        logs=options.out / "logs",
        sizes=tuple(options.settings.sizes),
        python=options.peers_python,
        packages=packages,
    )


def _prepare(options: PipelinesCommand, builder: ArtifactBuilder, console: Console) -> int:
    """Make what is missing; 1 if something could not be made."""
    failed = 0
    for system in options.systems:
        console.print(f"{system.name} …", style="dim")
        try:
            builder.artifact_of(system)
        except EngineError as error:
            failed = 1
            console.print(f"{system.name}: {escape(str(error))}", style="yellow", soft_wrap=True)
    return failed


def _open_results(options: PipelinesCommand) -> PipelineResults:
    """The results to continue, or new ones. Raises EngineError where results would be mixed or lost."""
    path = options.out / "peers.json"
    if not path.exists():
        return PipelineResults(settings=options.settings)
    if not options.resume:
        raise EngineError(f"{path} holds results: continue with --resume, or choose another --out.")
    try:
        results = PipelineResults.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise EngineError(f"{path} cannot be read: {error}") from None
    if results.settings != options.settings:
        raise EngineError(
            f"{path} was measured with other options ({results.settings}): give the same, or another --out."
        )
    return results


def _packages_of(python: str) -> dict[str, str]:
    """Versions of all packages of an interpreter. Raises EngineError if it does not run."""
    with suppress(OSError):
        done = subprocess.run([python, "-c", _LIST_PACKAGES], capture_output=True, text=True, check=False)  # noqa: S603 - named by the user
        if done.returncode == 0:
            found: dict[str, str] = json.loads(done.stdout)
            return {name.replace("_", "-"): version for name, version in found.items()}
    raise EngineError(f"{python} does not run: name an interpreter with --peers-python.")


if __name__ == "__main__":
    sys.exit(main())
