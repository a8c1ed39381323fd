"""How long requests of one step take beside requests of thirty, compared with the same requests alone."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveInt
from pydantic_settings import SettingsConfigDict
from rich.table import Table

from benchmarks.cli import Seconds, complain, table_console
from benchmarks.process import ServerProcess, ServerStartError, free_port
from engines.cli import CommandLine, parse
from engines.files import write_atomically
from loadtest.arrivals import poisson
from loadtest.charts import seconds
from loadtest.client import LoadTestError, ServerClient
from loadtest.provenance import ResultModel, Run, begin_run, now

_PROGRAM = "python -m benchmarks.server.few_steps"
_PROMPT = "a red heart on a yellow background"
_BOUND = 3.0  # times as long as alone, at the 95th percentile
_SETTLE = 8  # requests of each kind before anything is measured
_SEED = 1

Kind = Literal["few", "many"]
KINDS: tuple[Kind, ...] = ("few", "many")


class Latencies(ResultModel):
    """The seconds that requests of a kind took since they were due, in the order of their ends."""

    few: tuple[float, ...] = ()
    many: tuple[float, ...] = ()


class FewStepsResults(ResultModel):
    """The results file."""

    run: Run
    steps: dict[Kind, int] = Field(description="of requests of each kind")
    share: float = Field(description="the part of requests that have few steps")
    capacity: float = Field(description="requests of both kinds per second that the server completes at most")
    rate: float = Field(description="requests of both kinds per second that arrived")
    alone: Latencies = Field(description="each kind without the other, with the same arrivals")
    mixed: Latencies

    @property
    def times(self) -> float:
        """How many times as long as alone requests of few steps take, at the 95th percentile."""
        return _p95(self.mixed.few) / _p95(self.alone.few)

    @property
    def holds(self) -> bool:
        return self.times <= _BOUND


class FewStepsCommand(CommandLine):
    """Measure how long requests of one step take beside requests of thirty.

    python -m benchmarks.server.few_steps --out few-steps.json

    First it is counted how many requests of both kinds the server completes. At a part of that rate they arrive at
    random: those of few steps alone, those of many alone, and all. The exit code is 1 if the 95th percentile of those
    of few steps is more than three times that alone. Run it on a machine with nothing else to do.
    """

    model_config = SettingsConfigDict(cli_prog_name=_PROGRAM)

    out: Path = Field(description="JSON file to write the results to")
    bundle: Path = Field(Path("engines/demo"), description="bundle of the model")
    few: PositiveInt = Field(1, description="steps of the quick requests, which have no guidance")
    many: PositiveInt = Field(30, description="steps of the others, which have guidance")
    share: float = Field(0.3, gt=0, lt=1, description="part of the requests that are quick")
    load: float = Field(0.8, gt=0, lt=1, description="arrivals as a part of what the server completes at most")
    users: PositiveInt = Field(24, description="requests at a time while what it completes is counted")
    seconds: Seconds = Field(45.0, description="seconds of each part")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(FewStepsCommand, words)
    run = begin_run([*_PROGRAM.split(), *words])
    port = free_port()
    command = [sys.executable, "-m", "server", "--port", str(port), "--bundle", str(options.bundle)]
    try:
        with ServerProcess(command, port=port) as server:
            found = asyncio.run(_measure(server.url, options, run))
    except (ServerStartError, LoadTestError, OSError) as error:
        complain(error)
        return 2
    write_atomically(options.out, found.model_dump_json(indent=1).encode())
    table_console(120).print(_table(found))
    return int(not found.holds)


async def _measure(url: str, options: FewStepsCommand, run: Run) -> FewStepsResults:
    async with ServerClient(url, timeout=600) as client:
        asking = _Asking(client, options)
        for kind in KINDS:
            await asyncio.gather(*(asking.ask(kind, number) for number in range(_SETTLE)))
        capacity = await asking.capacity()
        rate = options.load * capacity
        arrivals = schedule(rate=rate, seconds=options.seconds, share=options.share)
        few, many, mixed = [await asking.arrive(one) for one in (*_by_kind(arrivals), arrivals)]
    return FewStepsResults(
        run=run.model_copy(update={"ended": now()}),
        steps={"few": options.few, "many": options.many},
        share=options.share,
        capacity=capacity,
        rate=rate,
        alone=Latencies(few=few.few, many=many.many),
        mixed=mixed,
    )


def schedule(*, rate: float, seconds: float, share: float) -> list[tuple[float, Kind]]:
    """When requests of which kind arrive: a Poisson process, the same one every time."""
    dice = np.random.default_rng(_SEED)
    arrivals = poisson(rate=rate, seconds=seconds, steps=(1, 1), seed=_SEED)
    return [(one.at, "few" if dice.random() < share else "many") for one in arrivals]


def _by_kind(arrivals: Sequence[tuple[float, Kind]]) -> Iterator[Sequence[tuple[float, Kind]]]:
    for kind in KINDS:
        yield [one for one in arrivals if one[1] == kind]


class _Asking:
    """Sends requests of both kinds. Raises LoadTestError where one has no image."""

    def __init__(self, client: ServerClient, options: FewStepsCommand) -> None:
        self._client, self._options = client, options
        self._fields: Mapping[Kind, Mapping[str, Any]] = {
            "few": {"num_inference_steps": options.few, "guidance_scale": 1.0},
            "many": {"num_inference_steps": options.many},
        }

    async def ask(self, kind: Kind, number: int) -> None:
        result = await self._client.send({"prompt": _PROMPT, "seed": number, **self._fields[kind]})
        if result.outcome != "completed":
            raise LoadTestError(f"A request of {kind} steps was {result.outcome}: {result.detail}")

    async def capacity(self) -> float:
        """Requests of both kinds per second that the server completes while as many as there are users wait."""
        loop = asyncio.get_running_loop()
        end, ended = loop.time() + self._options.seconds, 0
        begin = end - self._options.seconds / 2  # before, many have just begun and few have ended

        async def use(user: int) -> None:
            nonlocal ended
            dice = np.random.default_rng((_SEED, user))
            while loop.time() < end:
                await self.ask("few" if dice.random() < self._options.share else "many", int(dice.integers(2**31)))
                ended += begin <= loop.time() < end

        await asyncio.gather(*map(use, range(self._options.users)))
        if not ended:
            raise LoadTestError("No request was done: measure for more --seconds, or take fewer --many.")
        return ended / (end - begin)

    async def arrive(self, arrivals: Sequence[tuple[float, Kind]]) -> Latencies:
        """Ask as scheduled, whatever is still open; the seconds since each was due."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        spent: dict[Kind, list[float]] = {"few": [], "many": []}

        async def ask(number: int, due: float, kind: Kind) -> None:
            await self.ask(kind, number)
            spent[kind].append(loop.time() - began - due)

        async with asyncio.TaskGroup() as group:
            for number, (due, kind) in enumerate(arrivals):
                await asyncio.sleep(max(due - (loop.time() - began), 0))
                group.create_task(ask(number, due, kind))
        return Latencies(few=tuple(spent["few"]), many=tuple(spent["many"]))


def _p95(times: Sequence[float]) -> float:
    return float(np.percentile(times, 95))


def _table(found: FewStepsResults) -> Table:
    made = Table("requests", "alone: median", "p95", "mixed: median", "p95", "p95, times alone")
    for kind in KINDS:
        alone, mixed = (found.alone.few, found.mixed.few) if kind == "few" else (found.alone.many, found.mixed.many)
        figures = [seconds(value) for times in (alone, mixed) for value in (float(np.median(times)), _p95(times))]
        made.add_row(f"{found.steps[kind]} steps, {len(mixed)}", *figures, f"{_p95(mixed) / _p95(alone):.2f}")
    verdict = "holds" if found.holds else "does not hold"
    made.caption = f"{found.rate:.2f} of {found.capacity:.2f} requests/s; bound for the first: {_BOUND:.0f}: {verdict}"
    return made


if __name__ == "__main__":
    sys.exit(main())
