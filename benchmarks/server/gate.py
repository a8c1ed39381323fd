"""Is this tree slower than that one? Both serve the demo model on one thread, and are measured in turns.

python -m benchmarks.server.gate EARLIER [NOW]     folders of the source; NOW is the current one unless given

It exits with 1 where a figure got worse beyond the noise, and with 2 where nothing could be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loadtest.client import LoadTestError, ServerClient
from loadtest.compare import MARGIN
from loadtest.generator import LoadGenerator, measure_idle_latencies
from loadtest.mix import Mix, plain_entries
from loadtest.results import LoadLevel, Outcome

_LEVEL = 0.99  # of the intervals
_PAIRS = 80  # of requests on idle servers,
CROWDS = 24  # and of crowds
_CALLERS = 5  # of each crowd, on average
_BUSY = 0.6  # of what an idle server does one after the other
_STEPS = 4
_STARTING = 60.0  # seconds for a server to be ready
_TIMEOUT = 60.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Contender:
    """A server to be started: `python -m module arguments` in `folder`."""

    folder: Path
    module: str = "server"
    arguments: tuple[str, ...] = ()

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-m", self.module, "--port", str(port), "--threads", "1", *self.arguments]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure of the later tree over the earlier one's."""

    figure: str
    before: float  # seconds, the median
    after: float
    ratio: float
    low: float  # of its interval
    high: float

    @property
    def regressed(self) -> bool:
        return self.low > 1 + MARGIN


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.server.gate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("earlier", type=Path, metavar="EARLIER")
    parser.add_argument("now", type=Path, metavar="NOW", nargs="?", default=Path())
    given = parser.parse_args(argv)
    console = Console()
    try:
        found = asyncio.run(measure(Contender(given.earlier), Contender(given.now)))
    except LoadTestError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    console.print(table(found))
    return int(any(one.regressed for one in found))


async def measure(earlier: Contender, now: Contender, *, pairs: int = _PAIRS, crowds: int = CROWDS) -> list[Ratio]:
    (
        """Both under the same requests, in turns so short that what else the machine does meets both.

    Raises LoadTestError.
    """
        ""
    )
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(_serving(one)) for one in (earlier, now)]
        alone = [await measure_idle_latencies(node, _mix(0)) for node in nodes]
        idle = [await _in_turns(nodes, number, partial(_ask, number=number)) for number in range(pairs)]
        load = crowd_load(alone[0][0])
        crowded = [await _in_turns(nodes, seed, partial(_crowd, load=load, seed=seed)) for seed in range(crowds)]
    return [_compare("idle latency", idle), _compare("latency under load", crowded)]


async def _in_turns(
    nodes: Sequence[ServerClient], number: int, of: Callable[[ServerClient], Coroutine[None, None, float]]
) -> list[float]:
    """A figure of both; who is first changes, so that drift meets both alike."""
    turn = (0, 1) if number % 2 == 0 else (1, 0)
    told = {which: await of(nodes[which]) for which in turn}
    return [told[0], told[1]]


async def _ask(node: ServerClient, *, number: int) -> float:
    """Seconds of a request on an idle server."""
    began = time.perf_counter()
    answer = await node.send(_mix(0).fields(0, number))
    _check(answer.outcome, answer.detail)
    return time.perf_counter() - began


async def _crowd(node: ServerClient, *, load: LoadLevel, seed: int) -> float:
    """Mean seconds of requests that come by chance, and share steps."""
    driver = LoadGenerator(node, _mix(seed), idle_latencies=(1.0,), latency_targets=(1.0,), on_request=lambda _: None)
    measured = await driver.run(load, seed, lambda _: None)
    for one in measured.requests:
        _check(one.outcome, one.detail)
    return float(np.mean([one.latency for one in measured.requests]))


def crowd_load(alone: float) -> LoadLevel:
    """Of as many callers on every machine, whatever a picture takes there."""
    return LoadLevel(rate=_BUSY / alone, warm_up=0, seconds=_CALLERS * alone / _BUSY)


def _mix(seed: int) -> Mix:
    return Mix(plain_entries(["a red heart on a yellow background"], steps=_STEPS), seed)


def _check(outcome: Outcome, detail: str) -> None:
    """Raises LoadTestError where a request failed: then there is more wrong than the speed."""
    if outcome != "completed":
        raise LoadTestError(f"A request was {outcome}: {detail}")


def _compare(figure: str, seconds: Sequence[Sequence[float]]) -> Ratio:
    before, after = np.array(seconds).T
    ratio, low, high = compare(before, after)
    return Ratio(figure, float(np.median(before)), float(np.median(after)), ratio, low, high)


def compare(before: Floats, after: Floats) -> tuple[float, float, float]:
    """The ratio of pairs, and where it lies: Hodges and Lehmann (1963), by Wilcoxon's signed ranks.

    It asks of the ratios that they scatter alike to both sides, and of no law by which they do.
    """
    means = np.sort(walsh(np.log(after) - np.log(before)))
    beyond = ends(len(after))
    found = np.exp([np.median(means), means[beyond], means[-1 - beyond]])
    return float(found[0]), float(found[1]), float(found[2])


def walsh(values: Floats) -> Floats:
    """The means of all pairs, each value with itself among them."""
    rows, columns = np.triu_indices(len(values))
    means: Floats = (values[rows] + values[columns]) / 2
    return means


def ends(count: int) -> int:
    """How many of the sorted means of `count` values lie beyond the interval, on each side. Raises ValueError."""
    ways = [1]  # to get each sum of ranks
    for rank in range(1, count + 1):
        ways = [sum(pair) for pair in zip(ways + [0] * rank, [0] * rank + ways, strict=True)]
    below = sum(1 for total in accumulate(ways) if total <= (1 - _LEVEL) / 2 * 2**count)
    if not below:
        raise ValueError(f"{count} rounds are too few for an interval of {_LEVEL:.0%}")
    return below - 1


@asynccontextmanager
async def _serving(contender: Contender) -> AsyncIterator[ServerClient]:
    """A server that is ready, until it is no longer needed. Raises LoadTestError with what it said."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with tempfile.TemporaryFile() as said:
        command = contender.command(port)
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=contender.folder)  # noqa: S603 - our own
        try:
            async with ServerClient(f"http://127.0.0.1:{port}", timeout=_TIMEOUT) as node:
                if not await _ready(node, process):
                    said.seek(0)
                    raise LoadTestError(f"{contender.folder} does not serve: {said.read().decode(errors='replace')}")
                yield node
        finally:
            process.terminate()
            process.wait()


async def _ready(node: ServerClient, process: subprocess.Popen[bytes]) -> bool:
    for _ in range(math.ceil(_STARTING / 0.1)):
        if process.poll() is not None:
            return False
        try:
            await node.check_ready()
        except LoadTestError:
            await asyncio.sleep(0.1)
        else:
            return True
    return False


def table(ratios: Sequence[Ratio]) -> Table:
    made = Table(title="beside each other, in turns")
    for heading in ("figure", "before, ms", "now, ms", f"ratio, {_LEVEL:.0%} interval", ""):
        made.add_column(heading)
    for one in ratios:
        values = f"{one.before * 1000:.1f}", f"{one.after * 1000:.1f}"
        interval = f"{one.ratio:.3f} ({one.low:.3f} to {one.high:.3f})"
        made.add_row(one.figure, *values, interval, "[red]regressed[/]" if one.regressed else "")
    return made


if __name__ == "__main__":
    sys.exit(main())
