"""Measures how soon the server is ready: starts it again and again, from the process to /v2/health/ready."""

from __future__ import annotations

import itertools
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, PositiveInt
from pydantic_settings import SettingsConfigDict
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.cli import complain
from benchmarks.process import ROOT, ServerProcess, ServerStartError, server_command
from engines.cli import CommandLine, parse
from engines.files import write_atomically
from loadtest.analysis.statistics import Spread
from loadtest.provenance import ResultModel, Run, begin_run, now


class Start(ResultModel):
    """One start of a server."""

    ready: float = Field(description="seconds from the process to the response that it is ready")
    cpu: float = Field(description="seconds of processor time until then, of all its threads")


class TreeStarts(ResultModel):
    """All starts of one source tree's server."""

    tree: str
    starts: tuple[Start, ...]

    @property
    def ready(self) -> Spread:
        return Spread(values=tuple(start.ready for start in self.starts))

    @property
    def cpu(self) -> Spread:
        return Spread(values=tuple(start.cpu for start in self.starts))


class Startup(ResultModel):
    """The results file."""

    run: Run
    trees: tuple[TreeStarts, ...]


class StartupCommand(CommandLine):
    """Measure how soon the server is ready, from the start of its process to /v2/health/ready.

    python -m benchmarks.server.startup --out startup.json                       this tree, with the demo model
    python -m benchmarks.server.startup --out startup.json --compare ../before   and another tree, in alternation
    python -m benchmarks.server.startup --out startup.json -- --backend openvino

    Arguments after -- are passed to each server. Both trees run with this interpreter and its packages.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m benchmarks.server.startup")

    out: Path = Field(description="JSON file to write the results to")
    compare: Path | None = Field(
        None,
        description="another checkout, whose server is started in alternation with this one's",
    )
    runs: PositiveInt = Field(10, description="starts of each server, after one that is not counted")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    own, server = _split_at_dashes(words)
    options = parse(StartupCommand, own)
    run = begin_run(["python", "-m", "benchmarks.server.startup", *words])
    try:
        trees = _measure(options, server)
    except (ServerStartError, OSError) as error:
        complain(error)
        return 2
    found = Startup(run=run.model_copy(update={"ended": now()}), trees=trees)
    write_atomically(options.out, found.model_dump_json(indent=1).encode())
    Console().print(table(found))
    return 0


def _split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _measure(options: StartupCommand, arguments: Sequence[str]) -> tuple[TreeStarts, ...]:
    """Start the servers of all trees in alternation, so that other load on the machine affects them alike."""
    trees = [ROOT, options.compare.absolute()] if options.compare else [ROOT]
    for tree in trees:
        start(tree, arguments)  # brings its files into the page cache, and Python's caches up to date
    starts: dict[Path, list[Start]] = {tree: [] for tree in trees}
    orders = itertools.islice(itertools.cycle([trees, trees[::-1]]), options.runs)
    for order in track(list(orders), "starting", transient=True, console=Console(stderr=True)):
        for tree in order:
            starts[tree].append(start(tree, arguments))
    return tuple(TreeStarts(tree=os.path.relpath(tree), starts=tuple(found)) for tree, found in starts.items())


def start(tree: Path, arguments: Sequence[str]) -> Start:
    """Start the server of `tree`, and stop it when it is ready. Raises ServerStartError."""
    command, variables = server_command(*arguments), {"PYTHONPATH": str(tree)}
    with ServerProcess(command, folder=tree, variables=variables) as server:
        return Start(ready=server.ready_after, cpu=server.cpu_seconds())


def table(found: Startup) -> Table:
    """Each tree's results, and how the first compares with the second."""
    title = f"From starting the process to ready: {found.run.environment.processor}, {found.run.began[:10]}"
    result = Table("source tree", "starts", "time to ready, s", "CPU time, s", title=title)
    for one in found.trees:
        result.add_row(one.tree, str(len(one.starts)), _spread(one.ready), _spread(one.cpu))
    if len(found.trees) > 1:
        this, other = found.trees
        pairs = list(zip(this.starts, other.starts, strict=True))
        result.add_section()
        result.add_row(
            "first as a share of second, median of pairs",
            "",
            f"{statistics.median(one.ready / two.ready for one, two in pairs):.0%}",
            f"{statistics.median(one.cpu / two.cpu for one, two in pairs):.0%}",
        )
    return result


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


if __name__ == "__main__":
    sys.exit(main())
