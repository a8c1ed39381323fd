"""Puts load on a running server, and tells what it holds and where it breaks.

python -m loadtest --url http://127.0.0.1:8000 --rate 2 --rate 4 --duration 60 --out load    callers by chance
python -m loadtest --url http://127.0.0.1:8000 --sweep --duration 30 --out load              up to twice the knee
python -m loadtest --url http://127.0.0.1:8000 --users 8 --duration 60 --out load            each waits for its picture

It writes DIR/requests.jsonl, DIR/summary.json and DIR/report.html. It exits with 1 where --baseline shows a regression,
and with 2 where nothing could be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from engines.files import write_atomically
from loadtest.client import Node, Unusable
from loadtest.compare import compare, matches, too_short
from loadtest.drive import Driver, measure_alone
from loadtest.html import page, ratio, seconds
from loadtest.mix import Mix, MixError
from loadtest.options import add_what, conflict, count, entries_of, number, positive
from loadtest.provenance import Environment, Run, begin_run, now
from loadtest.response_formats import FACES
from loadtest.results import OUTCOMES, Load, Measured, Outcome, Point, Sent, Summary
from loadtest.sweep import breaks, knee, next_rate

_SLO = 4.0  # times the idle latency
_FIRST = 0.25  # of what an idle server does one after the other: where a sweep begins
_HERE = {"localhost", "127.0.0.1", "::1"}
_NARROW = 160  # characters of a table that nobody watches


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for."""

    url: str
    out: Path
    rates: tuple[float, ...]
    users: tuple[int, ...]
    sweep: bool
    factor: float
    duration: float
    warm_up: float
    slo: float | None
    timeout: float
    face: str
    seed: int
    baseline: Path | None
    what: argparse.Namespace  # of the options that say what is sent

    def load(self, *, rate: float | None = None, users: int | None = None) -> Load:
        return Load(rate=rate, users=users, warm_up=self.warm_up, seconds=self.duration)


@dataclass(slots=True)
class Found:
    """What is known of a run so far."""

    run: Run
    models: list[dict[str, Any]]
    server_version: str | None
    mix: Mix
    alone: tuple[float, ...]
    loads: list[Measured] = field(default_factory=list)

    @property
    def points(self) -> list[Point]:
        return [one.point for one in self.loads]


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = _options(words)
    console = Console() if sys.stdout.isatty() else Console(width=_NARROW)
    run = begin_run(["python", "-m", "loadtest", *words])
    try:
        earlier = _earlier(options, options.baseline) if options.baseline else None
        options.out.mkdir(parents=True, exist_ok=True)
        found = asyncio.run(_measure(options, run))
        summary = _summary(options, found, earlier)
    except (Unusable, MixError, OSError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print(f"stopped: what had ended is in {options.out / 'requests.jsonl'}", soft_wrap=True)
        return 130
    write_atomically(options.out / "summary.json", summary.model_dump_json(indent=1).encode())
    write_atomically(options.out / "report.html", page(summary, found.loads).encode())
    console.print(table(summary))
    for note in summary.notes:
        console.print(escape(note), style="yellow", highlight=False, soft_wrap=True)
    if summary.baseline is not None:
        console.print(_comparison(summary))
    console.print(f"report: {options.out / 'report.html'}", highlight=False, soft_wrap=True)
    return int(any(one.regressed for one in summary.compared))


async def _measure(options: Options, run: Run) -> Found:
    """Everything that is asked of the server. Raises Unusable, MixError."""
    async with Node(options.url, timeout=options.timeout, face=FACES[options.face]) as node:
        await node.check_ready()
        models = await node.models()
        mix = Mix(entries_of(options.what, lambda: models[0]["examples"] if models else ()), options.seed)
        found = Found(run, models, await node.version(), mix, await measure_alone(node, mix))
        with (options.out / "requests.jsonl").open("w", encoding="utf-8") as file, _Watching(file) as watching:
            driver = Driver(node, mix, alone=found.alone, accepted=_accepted(options, found.alone), hear=watching.hear)
            async for load in _loads(options, found):
                tell = watching.begin(load)
                found.loads.append(await driver.put(load, len(found.loads), tell))
        found.loads.sort(key=lambda one: (one.point.load.users or 0, one.point.load.rate or 0.0))
        return found


async def _loads(options: Options, found: Found) -> AsyncIterator[Load]:
    """The loads that were asked for, each once the last is measured."""
    if options.sweep:
        first = min(options.rates, default=_FIRST / found.mix.mean(found.alone))
        while (rate := next_rate(found.points, first=first, factor=options.factor)) is not None:
            yield options.load(rate=rate)
    else:
        for rate in options.rates:
            yield options.load(rate=rate)
    for users in options.users:
        yield options.load(users=users)


class _Watching:
    """Who hears of each ending: the file of requests, and on a terminal a bar for each load."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._counts: Counter[Outcome] = Counter()
        console = Console(stderr=True)
        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[counts]}", markup=False))
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)

    def __enter__(self) -> _Watching:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, load: Load) -> Callable[[float], None]:
        """A bar for `load`; returns who moves it to some seconds into the load."""
        self._counts.clear()
        task = self._progress.add_task(load.label, total=load.end, counts="")

        def tell(at: float) -> None:
            counts = ", ".join(f"{self._counts[outcome]} {outcome}" for outcome in OUTCOMES if self._counts[outcome])
            self._progress.update(task, completed=min(at, load.end), counts=counts)

        return tell

    def hear(self, sent: Sent) -> None:
        self._counts[sent.outcome] += 1
        self._file.write(sent.model_dump_json() + "\n")


def _accepted(options: Options, alone: Sequence[float]) -> tuple[float, ...]:
    return tuple(options.slo if options.slo is not None else _SLO * one for one in alone)


def _summary(options: Options, found: Found, earlier: tuple[Summary, list[Measured]] | None) -> Summary:
    summary = Summary(
        run=found.run.model_copy(update={"ended": now(), "environment": _with_client(found.run)}),
        url=options.url,
        face=options.face,
        server_version=found.server_version,
        models=found.models,
        seed=options.seed,
        slo=found.mix.mean(_accepted(options, found.alone)),
        slo_given=options.slo is not None,
        entries=found.mix.entries,
        alone=found.alone,
        points=tuple(found.points),
        knee=knee(found.points),
        notes=tuple(_notes(options, found.points)),
    )
    return _beside(summary, found.loads, earlier, options.baseline) if earlier else summary


def _beside(
    summary: Summary, loads: Sequence[Measured], earlier: tuple[Summary, list[Measured]], folder: Path | None
) -> Summary:
    before, kept = earlier
    pairs = list(matches(kept, loads))
    same_loads = all(one.point.load == other.point.load for one, other in pairs)
    notes = list(summary.notes)
    callers = [(one.face, one.seed, one.entries) for one in (before, summary)]
    if not same_loads or callers[0] != callers[1]:
        notes.append("The earlier run had other callers.")
    if short := [later.point.load.label for one, later in pairs if too_short(one, later)]:
        notes.append(f"Too short to compare latencies at {', '.join(short)}: give it a longer --duration.")
    more = {"baseline": str(folder), "compared": tuple(compare(kept, loads)), "notes": tuple(notes)}
    return summary.model_copy(update=more)


def _earlier(options: Options, folder: Path) -> tuple[Summary, list[Measured]]:
    """A run that was written before, under some of the same loads. Raises Unusable."""
    try:
        summary = Summary.model_validate_json((folder / "summary.json").read_bytes())
        lines = (folder / "requests.jsonl").read_text(encoding="utf-8").splitlines()
        sent = [Sent.model_validate_json(line) for line in lines]
    except (OSError, ValueError) as error:
        raise Unusable(f"{folder} holds no run to compare with: {error}") from None
    asked = [options.load(rate=rate) for rate in options.rates] + [options.load(users=users) for users in options.users]
    if not {load.label for load in asked} & {point.load.label for point in summary.points}:
        had = ", ".join(point.load.label for point in summary.points)
        raise Unusable(f"{folder} has none of these loads, but {had}: give the same --rate or --users.")
    under = {point.number: [one for one in sent if one.load == point.number] for point in summary.points}
    return summary, [Measured(point, tuple(under[point.number])) for point in summary.points]


def _with_client(run: Run) -> Environment:
    packages = {**run.environment.packages, "httpx": version("httpx")}
    return run.environment.model_copy(update={"packages": dict(sorted(packages.items()))})


def _notes(options: Options, points: Sequence[Point]) -> Iterator[str]:
    """What makes figures say less than they seem to."""
    for point in points:
        if not point.kept_up and point.late:
            late = seconds(point.late.p99)
            yield f"At {point.load.label} the client could not keep up: it was {late} late (p99). Run it elsewhere."
    if urlsplit(options.url).hostname in _HERE:
        yield "Client and server shared a machine, and took its time from each other."
    few = [point.load.label for point in points if point.requests < 100]
    if few:
        yield f"Fewer than 100 requests count at {', '.join(few)}: a p99 there is little more than the slowest one."
    if options.sweep and not breaks(points):
        yield "The sweep ended before anything broke: begin it at a higher --rate."


def table(summary: Summary) -> Table:
    """Every load on a line."""
    made = Table(title=f"{escape(summary.url)}: good is within {seconds(summary.slo)}")
    for heading in ("load", "requests", "offered", "throughput", "goodput", "p50", "p90", "p95", "p99", "refused"):
        made.add_column(heading, justify="left" if heading == "load" else "right")
    made.add_column("other failures", justify="right")
    made.add_column("client late", justify="right")
    for point in summary.points:
        made.add_row(*_cells(point, summary.knee))
    return made


def _cells(point: Point, at_knee: float | None) -> Iterator[str]:
    yield point.load.label + (" [bold]knee[/]" if point.load.rate == at_knee is not None else "")
    yield str(point.requests)
    yield from (f"{value:.2f}/s" for value in (point.offered, point.throughput, point.goodput))
    one = point.latency
    yield from (seconds(value) for value in (one.p50, one.p90, one.p95, one.p99)) if one else ("–",) * 4
    yield str(point.outcomes["refused"])
    yield str(point.other_failures)
    late = seconds(point.late.p99) if point.late else "–"
    yield late if point.kept_up else f"[red]{late}[/]"


def _comparison(summary: Summary) -> Table:
    made = Table(title=f"beside {escape(summary.baseline or '')}")
    for heading in ("load", "figure", "before", "now", "ratio, 99 % interval", ""):
        made.add_column(heading)
    for one in summary.compared:
        values = (f"{value:.3g}" for value in (one.before, one.after))
        made.add_row(one.load, one.figure, *values, ratio(one), "[red]regressed[/]" if one.regressed else "")
    return made


def _options(words: Sequence[str]) -> Options:
    parser = _parser()
    given = parser.parse_args(words)
    if not (given.rate or given.sweep or given.users):
        parser.error("say how much load: --rate R, --sweep or --users N")
    if given.sweep and given.baseline:
        parser.error("--baseline compares equal loads, and a sweep finds its own: give --rate in place of --sweep")
    if wrong := conflict(given):
        parser.error(wrong)
    return Options(
        url=given.url,
        out=given.out,
        rates=tuple(dict.fromkeys(given.rate)),
        users=tuple(dict.fromkeys(given.users)),
        sweep=given.sweep,
        factor=given.factor,
        duration=given.duration,
        warm_up=given.warm_up,
        slo=given.slo,
        timeout=given.timeout,
        face=given.face,
        seed=given.seed,
        baseline=given.baseline,
        what=given,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument("--baseline", type=Path, metavar="DIR", help="an earlier run's folder, to compare with")
    _add_load(parser.add_argument_group("how much"))
    add_what(parser.add_argument_group("what is sent"))
    return parser


def _add_load(group: argparse._ArgumentGroup) -> None:
    add, default = group.add_argument, "default: %(default)s"
    often = "may be given several times"
    add("--rate", type=positive, action="append", default=[], metavar="R", help=f"callers per second; {often}")
    add(
        "--sweep",
        action="store_true",
        help="raise the rate, from --rate or a quarter of an idle server's, past the knee",
    )
    add("--factor", type=_above_one, default=1.5, help=f"by which a sweep raises it ({default})")
    add("--users", type=count, action="append", default=[], metavar="N", help=f"who wait for their pictures; {often}")
    add("--duration", type=positive, default=30, metavar="S", help=f"seconds of each load that count ({default})")
    add("--warm-up", type=_not_negative, default=5, metavar="S", help=f"seconds before those, of each load ({default})")
    add("--slo", type=positive, metavar="S", help="seconds within which an answer is good (default: 4 idle latencies)")
    add("--timeout", type=positive, default=120, metavar="S", help=f"after which the client gives up ({default})")


def _not_negative(text: str) -> float:
    return number(text, lambda value: value >= 0, "of 0 or more")


def _above_one(text: str) -> float:
    return number(text, lambda value: value > 1.05, "above 1.05")


if __name__ == "__main__":
    sys.exit(main())
