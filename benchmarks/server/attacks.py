"""Attacks a server, one attack after the other, and measures what others notice of it: answers, /live, memory."""

from __future__ import annotations

import asyncio
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field
from pydantic_settings import SettingsConfigDict
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.cli import complain, table_console
from benchmarks.faults.attackers import ATTACKS, SHORT, AttackReport
from benchmarks.faults.callers import Caller, Tally
from benchmarks.faults.probe import Prober
from benchmarks.process import ROOT, ServerProcess, ServerStartError, free_port, memory_of
from engines.cli import CommandLine, Repeatable, parse
from engines.files import write_atomically
from loadtest.charts import seconds
from loadtest.provenance import ResultModel, Run, begin_run, now

_MEBI = 2**20
_LIMIT = 300.0  # seconds for an attack
_IDLE = 10.0  # seconds that the server gets to give memory back
_QUEUE = 8  # requests that may wait: ten times the capacity is then a modest number of connections
_AT_ONCE = ("burst",)  # attacks whose refusals wait for one another: their median says how many there are
_LIVE_BOUND, _MEDIAN_BOUND, _TAIL_BOUND = 0.2, 0.01, 0.1  # seconds


class Spread(ResultModel):
    """Times in seconds."""

    count: int
    median: float
    p99: float
    most: float

    @property
    def text(self) -> str:
        return f"{seconds(self.median)}, {seconds(self.p99)}, {seconds(self.most)}"


class AttackResult(ResultModel):
    """What was seen during one attack."""

    name: str
    answers: dict[str, int] = Field(description="the attackers' answers by status; closed or open without one")
    refusals: Spread | None = Field(description="times of the refusals (429)")
    polite: Spread | None = Field(description="times until a well-behaved caller beside it had its picture")
    live: Spread = Field(description="times of /v2/health/live")
    live_failures: tuple[str, ...] = Field(description="what came in place of a 200")
    before: int = Field(description="memory of the server (PSS), bytes")
    peak: int
    after: int
    is_ready: bool = Field(description="the server is ready afterwards")

    @property
    def holds(self) -> bool:
        """Whether the bounds that docs/reliability.md promises were kept."""
        median_bound = _TAIL_BOUND if self.name in _AT_ONCE else _MEDIAN_BOUND
        quick = self.refusals is None or (self.refusals.median <= median_bound and self.refusals.p99 <= _TAIL_BOUND)
        return self.is_ready and not self.live_failures and self.live.most < _LIVE_BOUND and quick


class AttackResults(ResultModel):
    """The results file."""

    run: Run
    attacks: tuple[AttackResult, ...]


class AttacksCommand(CommandLine):
    """Attack a server and measure what others notice: refusals, /live from a process of its own, memory.

    python -m benchmarks.server.attacks --out attacks.json                             all attacks
    python -m benchmarks.server.attacks --out attacks.json --attack header_flood       one of them

    Each attack meets a new server with the demo model and one thread, and comes from a process of its own. Run it on a
    machine with nothing else to do and at least two cores. The exit code is 1 if a bound did not hold.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m benchmarks.server.attacks")

    out: Path = Field(description="JSON file to write the results to")
    attack: Repeatable[str] = Field((), description=f"may be repeated; all unless given: {', '.join(ATTACKS)}")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(AttacksCommand, words)
    if unknown := set(options.attack) - set(ATTACKS):
        complain(f"{', '.join(sorted(unknown))} is none of {', '.join(ATTACKS)}")
        return 2
    run = begin_run(["python", "-m", "benchmarks.server.attacks", *words])
    names = track(options.attack or list(ATTACKS), "attacking", transient=True, console=Console(stderr=True))
    try:
        attacks = tuple(measure(name) for name in names)
    except (ServerStartError, OSError, subprocess.SubprocessError) as error:
        complain(error)
        return 2
    found = AttackResults(run=run.model_copy(update={"ended": now()}), attacks=attacks)
    write_atomically(options.out, found.model_dump_json(indent=1).encode())
    table_console(180).print(table(found))
    return int(not all(attack.holds for attack in attacks))


def measure(name: str) -> AttackResult:
    """Start a server, attack it, and return what was seen. Raises ServerStartError and subprocess.SubprocessError."""
    port = free_port()
    command = [sys.executable, "-m", "server", "--port", str(port), "--threads", "1", "--max-waiting", str(_QUEUE)]
    if name == "malformed_flood":
        command = ["sh", "-c", f"{shlex.join(command)} 2>&1 | sleep 3600"]  # a log that nobody reads
    with ServerProcess(command, port=port, sample_memory=True) as server:
        asyncio.run(_warm_up(server.url))
        time.sleep(1)
        before = memory_of(server.pid)
        server.peak_memory = 0
        with Prober(server.url) as prober:
            damage = _attack(name, server.url)
        time.sleep(_IDLE)
        with Prober(server.url) as ready:
            pass
        after = memory_of(server.pid)
        server.stop()
        return AttackResult(
            name=name,
            answers=damage.answers,
            refusals=_spread(damage.refusals),
            polite=_spread(damage.polite),
            live=_spread(prober.probes.seconds) or Spread(count=0, median=0, p99=0, most=0),
            live_failures=prober.probes.failures,
            before=before,
            peak=max(server.peak_memory, before),
            after=after,
            is_ready=not ready.probes.failures,
        )


async def _warm_up(url: str) -> None:
    """Send twice what the server takes, so that what only requests load is there before memory is measured."""
    caller = Caller(url, Tally())
    await asyncio.gather(*(caller.ask(SHORT) for _ in range(4 * _QUEUE)))


def _attack(name: str, url: str) -> AttackReport:
    command = [sys.executable, "-m", "benchmarks.faults.attackers", name, url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_LIMIT, check=True)  # noqa: S603 - our own
    return AttackReport.model_validate_json(done.stdout)


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    median, p99 = (float(value) for value in np.percentile(values, (50, 99)))
    return Spread(count=len(values), median=median, p99=p99, most=max(values))


def table(found: AttackResults) -> Table:
    """Return a line for each attack."""
    title = f"Attacks on a server with one thread: {found.run.environment.processor}, {found.run.began[:10]}"
    result = Table(title=title)
    headings = (
        "attack",
        "answers",
        "refusals: median, p99, max",
        "/live: median, p99, max",
        "memory before, peak, after",
    )
    for heading in (*headings, "holds"):
        result.add_column(heading)
    for one in found.attacks:
        answers = ", ".join(f"{count} {name}" for name, count in sorted(one.answers.items()))
        polite = f"; polite: {one.polite.text}" if one.polite else ""
        memory = ", ".join(f"{value / _MEBI:.0f}" for value in (one.before, one.peak, one.after))
        refusals = one.refusals.text if one.refusals else "–"
        failures = f" ({len(one.live_failures)} failed)" if one.live_failures else ""
        holds = "yes" if one.holds else "[red]no[/]"
        result.add_row(one.name, answers + polite, refusals, one.live.text + failures, f"{memory} MiB", holds)
    return result


if __name__ == "__main__":
    sys.exit(main())
