"""Measures how soon a server answers: starts it again and again, from the process to /v2/health/ready.

python -m benchmarks.server.startup --out startup.json                      this tree, with the demo model
python -m benchmarks.server.startup --out startup.json --beside ../before   and another tree's server, in turns with it
python -m benchmarks.server.startup --out startup.json -- --backend openvino

What follows -- is said to each server. Both trees run with this interpreter and its packages.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import Field
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from benchmarks.server.overhead import READY, NoServer
from engines.files import write_atomically
from loadtest.options import count
from loadtest.provenance import ResultModel, Run, begin_run, now
from loadtest.statistics import Spread

_TREE = Path(__file__).parents[2]


class Start(ResultModel):
    """One start."""

    ready: float = Field(description="seconds from the process to the answer that it is ready")
    cpu: float = Field(description="seconds of processor time that it had taken by then, of all its threads")


class Starts(ResultModel):
    """All starts of one tree's server."""

    tree: str
    starts: tuple[Start, ...]

    @property
    def ready(self) -> Spread:
        return Spread(values=tuple(start.ready for start in self.starts))

    @property
    def cpu(self) -> Spread:
        return Spread(values=tuple(start.cpu for start in self.starts))


class Startup(ResultModel):
    """The file's content."""

    run: Run
    trees: tuple[Starts, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for."""

    out: Path
    beside: Path | None
    runs: int
    server: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = _options(words)
    run = begin_run(["python", "-m", "benchmarks.server.startup", *words])
    try:
        trees = _measure(options)
    except (NoServer, OSError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    found = Startup(run=run.model_copy(update={"ended": now()}), trees=trees)
    write_atomically(options.out, found.model_dump_json(indent=1).encode())
    Console().print(table(found))
    return 0


def _measure(options: Options) -> tuple[Starts, ...]:
    """Start each tree's server in turns: what else the machine does, it does to both."""
    trees = [_TREE, options.beside.absolute()] if options.beside else [_TREE]
    for tree in trees:
        start(tree, options.server)  # brings its files to the page cache, and Python's caches up to date
    starts: dict[Path, list[Start]] = {tree: [] for tree in trees}
    turns = itertools.islice(itertools.cycle([trees, trees[::-1]]), options.runs)
    for turn in track(list(turns), "starting", transient=True, console=Console(stderr=True)):
        for tree in turn:
            starts[tree].append(start(tree, options.server))
    return tuple(Starts(tree=os.path.relpath(tree), starts=tuple(found)) for tree, found in starts.items())


def start(tree: Path, arguments: Sequence[str]) -> Start:
    """Start the server of `tree`, and stop it when it is ready. Raises NoServer."""
    command = [sys.executable, "-m", "server", "--port", "0", *arguments]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=tree, env=environment, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own
        try:
            _ask(_url(process))
            ready = time.perf_counter() - began
            spent = psutil.Process(process.pid).cpu_times()
        finally:
            process.terminate()
    return Start(ready=ready, cpu=spent.user + spent.system)


def _url(process: subprocess.Popen[str]) -> str:
    said: list[str] = []
    for line in process.stderr or ():
        said.append(line)
        if found := READY.search(line):
            return found[1]
    raise NoServer("".join(said))


def _ask(url: str) -> None:
    try:
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=30):  # noqa: S310 - http, as the server says
            return
    except urllib.error.HTTPError as error:
        raise NoServer(f"The server says that it is ready, and its /v2/health/ready {error.code}.") from error


def table(found: Startup) -> Table:
    """Each tree, and how the first compares with the other."""
    title = f"From the process to ready: {found.run.environment.processor}, {found.run.began[:10]}"
    made = Table("tree", "starts", "seconds to ready", "seconds of CPU", title=title)
    for one in found.trees:
        made.add_row(one.tree, str(len(one.starts)), _spread(one.ready), _spread(one.cpu))
    if len(found.trees) > 1:
        this, other = found.trees
        pairs = list(zip(this.starts, other.starts, strict=True))
        made.add_section()
        made.add_row(
            "the first takes, of the other's",
            "",
            f"{statistics.median(one.ready / two.ready for one, two in pairs):.0%}",
            f"{statistics.median(one.cpu / two.cpu for one, two in pairs):.0%}",
        )
    return made


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def _options(words: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.server.startup", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="where the raw values go")
    add(
        "--beside", type=Path, metavar="TREE", help="another checkout, whose server is started in turns with this one's"
    )
    add("--runs", type=count, default=10, help="starts of each, after one that does not count (default: %(default)s)")
    add("server", nargs="*", metavar="-- OPTIONS", help="what the servers are told")
    given = parser.parse_args(words)
    return Options(**{**vars(given), "server": tuple(given.server)})


if __name__ == "__main__":
    sys.exit(main())
