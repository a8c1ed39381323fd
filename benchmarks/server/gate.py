"""Tests whether one source tree is slower than another: both serve the demo model and are measured in alternation."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict
from rich.console import Console
from rich.table import Table

from benchmarks.cli import complain
from benchmarks.process import ServerProcess, ServerStartError, server_command
from engines.cli import CommandLine, parse
from loadtest.analysis.compare import MARGIN
from loadtest.analysis.results import LoadLevel, Outcome
from loadtest.client import LoadTestError, ServerClient
from loadtest.generator import LoadGenerator, measure_idle_latencies
from loadtest.mix import Mix, Wanted, plain_entries

_LEVEL = 0.99  # confidence of the intervals
_PAIRS = 80  # pairs of requests on idle servers
CROWDS = 24  # pairs of loads with concurrent callers
_CALLERS = 5  # of each such load, on average
_BUSY = 0.6  # their rate, as a share of what an idle server does one after the other
_STEPS = 4
_TIMEOUT = 60.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class GateServer:
    """A server to be started: `python -m module arguments` in `folder`, which may hold an earlier source tree."""

    folder: Path
    module: str = "server"
    arguments: tuple[str, ...] = ()

    def process(self) -> ServerProcess:
        return ServerProcess(server_command("--threads", "1", *self.arguments, module=self.module), folder=self.folder)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A measurement of the later tree divided by the earlier one's."""

    measurement: str
    before: float  # seconds, the median
    after: float
    ratio: float
    low: float  # end of the interval
    high: float

    @property
    def regressed(self) -> bool:
        return self.low > 1 + MARGIN


class GateCommand(CommandLine):
    """Test whether this tree is slower than an earlier one. Both serve the demo model on one thread.

    python -m benchmarks.server.gate EARLIER [NOW]     folders of the source code

    The exit code is 1 if a measurement got worse beyond the noise, and 2 if nothing could be measured.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m benchmarks.server.gate")

    earlier: CliPositionalArg[Path] = Field(description="folder of the earlier source tree")
    now: CliPositionalArg[Path] = Field(Path(), description="folder of the tree to test")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(GateCommand, list(sys.argv[1:] if argv is None else argv))
    try:
        found = asyncio.run(measure(GateServer(options.earlier), GateServer(options.now)))
    except (LoadTestError, ServerStartError) as error:
        complain(error)
        return 2
    Console().print(table(found))
    return int(any(one.regressed for one in found))


async def measure(earlier: GateServer, now: GateServer, *, pairs: int = _PAIRS, crowds: int = CROWDS) -> list[Ratio]:
    """Measure both with the same requests, in alternation so short that other load on the machine affects both.

    Raises ServerStartError and LoadTestError.
    """
    async with AsyncExitStack() as stack:
        servers = [stack.enter_context(one.process()) for one in (earlier, now)]
        nodes = [await stack.enter_async_context(ServerClient(one.url, timeout=_TIMEOUT)) for one in servers]
        alone = [await measure_idle_latencies(node, _mix(0)) for node in nodes]
        idle = [await _alternate(nodes, number, partial(_latency, number=number)) for number in range(pairs)]
        load = crowd_load(alone[0][0])
        crowded = [
            await _alternate(nodes, seed, partial(_crowd_latency, load=load, seed=seed)) for seed in range(crowds)
        ]
    return [_compare("idle latency", idle), _compare("latency under load", crowded)]


async def _alternate(
    nodes: Sequence[ServerClient], number: int, of: Callable[[ServerClient], Coroutine[None, None, float]]
) -> list[float]:
    """Measure both once; which is first alternates, so that drift affects both alike."""
    order = (0, 1) if number % 2 == 0 else (1, 0)
    found = {which: await of(nodes[which]) for which in order}
    return [found[0], found[1]]


async def _latency(node: ServerClient, *, number: int) -> float:
    """Seconds of a request on an idle server."""
    began = time.perf_counter()
    answer = await node.send(_mix(0).fields(0, number))
    _check(answer.outcome, answer.detail)
    return time.perf_counter() - began


async def _crowd_latency(node: ServerClient, *, load: LoadLevel, seed: int) -> float:
    """Mean seconds of requests that arrive at random times and share steps."""
    generator = LoadGenerator(
        node, _mix(seed), idle_latencies=(1.0,), latency_targets=(1.0,), on_request=lambda _: None
    )
    measured = await generator.run(load, seed, lambda _: None)
    for one in measured.requests:
        _check(one.outcome, one.detail)
    return float(np.mean([one.latency for one in measured.requests]))


def crowd_load(alone: float) -> LoadLevel:
    """A load of as many callers on every machine, however long an image takes there."""
    return LoadLevel(rate=_BUSY / alone, warm_up=0, seconds=_CALLERS * alone / _BUSY)


def _mix(seed: int) -> Mix:
    return Mix(plain_entries(Wanted(["a red heart on a yellow background"], _STEPS)), seed)


def _check(outcome: Outcome, detail: str) -> None:
    """Raises LoadTestError if a request failed: then more than the speed is wrong."""
    if outcome != "completed":
        raise LoadTestError(f"A request was {outcome}: {detail}")


def _compare(measurement: str, seconds: Sequence[Sequence[float]]) -> Ratio:
    before, after = np.array(seconds).T
    ratio, low, high = compare(before, after)
    return Ratio(measurement, float(np.median(before)), float(np.median(after)), ratio, low, high)


def compare(before: Floats, after: Floats) -> tuple[float, float, float]:
    """Ratio of pairs with its confidence interval: Hodges and Lehmann (1963), by Wilcoxon's signed ranks.

    It assumes that the ratios are distributed symmetrically, and nothing else of their distribution.
    """
    means = np.sort(walsh(np.log(after) - np.log(before)))
    beyond = ends(len(after))
    found = np.exp([np.median(means), means[beyond], means[-1 - beyond]])
    return float(found[0]), float(found[1]), float(found[2])


def walsh(values: Floats) -> Floats:
    """Walsh averages: the means of all pairs, including each value with itself."""
    rows, columns = np.triu_indices(len(values))
    means: Floats = (values[rows] + values[columns]) / 2
    return means


def ends(count: int) -> int:
    """How many of the sorted means of `count` values lie outside the interval on each side. Raises ValueError."""
    ways = [1]  # in how many ways each sum of ranks comes about
    for rank in range(1, count + 1):
        ways = [sum(pair) for pair in zip(ways + [0] * rank, [0] * rank + ways, strict=True)]
    below = sum(1 for total in accumulate(ways) if total <= (1 - _LEVEL) / 2 * 2**count)
    if not below:
        raise ValueError(f"{count} pairs are too few for an interval of {_LEVEL:.0%}")
    return below - 1


def table(ratios: Sequence[Ratio]) -> Table:
    """Each measurement, for people."""
    made = Table(title="Latency of both trees, measured in alternation")
    for heading in ("measurement", "earlier, median ms", "now, median ms", f"now / earlier, {_LEVEL:.0%} interval", ""):
        made.add_column(heading)
    for one in ratios:
        values = f"{one.before * 1000:.1f}", f"{one.after * 1000:.1f}"
        interval = f"{one.ratio:.3f} ({one.low:.3f} to {one.high:.3f})"
        made.add_row(one.measurement, *values, interval, "[red]regressed[/]" if one.regressed else "")
    return made


if __name__ == "__main__":
    sys.exit(main())
