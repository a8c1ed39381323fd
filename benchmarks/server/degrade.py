"""What an overloaded server still answers in time, with and without --degrade-at."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, get_args

import httpx
import numpy as np
from pydantic import Field, PositiveInt
from pydantic_settings import SettingsConfigDict
from rich.table import Table

from benchmarks.cli import Seconds, complain, table_console
from benchmarks.process import ServerProcess, ServerStartError, server_command
from engines.cli import CommandLine, parse
from engines.files import write_atomically
from loadtest.analysis.results import LoadLevel
from loadtest.arrivals import poisson
from loadtest.charts import seconds
from loadtest.client import LoadTestError, ServerClient
from loadtest.generator import LoadGenerator
from loadtest.mix import Mix, MixEntry
from loadtest.provenance import ResultModel, Run, begin_run, now
from server.requests.depths import Cache

_PROGRAM = "python -m benchmarks.server.degrade"
_PROMPT = "a red heart on a yellow background"
_CROWD = 2  # users for each image that fits into a step, while the capacity is measured
_DIGITS = 3  # of seconds in the file

Variant = Literal["plain", "degrading"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
POSITIONS: tuple[Cache, ...] = get_args(Cache)
Ending = Literal["completed", "refused", "expired"]
_ENDINGS: dict[int, Ending] = {200: "completed", 429: "refused", 504: "expired"}


class Sent(ResultModel):
    """A request and how it ended. Times are seconds after the load began."""

    due: float
    ended: float
    ending: Ending = Field(description="refused: 429, the queue was full; expired: 504, its time limit had passed")
    cache: Cache | None = Field(None, description="the position of the dial, of completed requests")

    @property
    def latency(self) -> float:
        """Seconds since it was due."""
        return self.ended - self.due


class Load(ResultModel):
    """The requests that one server got in one round."""

    variant: Variant
    round: int
    requests: tuple[Sent, ...] = Field(description="in the order in which they were due, those of the warm-up too")


class DegradeResults(ResultModel):
    """The results file."""

    run: Run
    model: str
    steps: int
    capacity: float = Field(description="requests per second that the plain server completes at most")
    rate: float = Field(description="requests per second that arrived, at random")
    limit: float = Field(description="timeout_s of each request, within which it counts as goodput")
    degrade_at: float
    max_waiting: int
    warm_up: float = Field(description="seconds of each load whose requests are not counted")
    seconds: float = Field(description="seconds of each load that count")
    loads: tuple[Load, ...] = Field(description="in the order in which they ran")

    def counted(self, variant: Variant) -> list[Sent]:
        """The requests of all rounds that count."""
        every = (one for load in self.loads if load.variant == variant for one in load.requests)
        return [one for one in every if one.due >= self.warm_up]

    def goodput(self, variant: Variant) -> float:
        """Requests per second that were completed within the limit since they were due."""
        rounds = sum(load.variant == variant for load in self.loads)
        return sum(one.latency <= self.limit for one in self.completed(variant)) / (rounds * self.seconds)

    def completed(self, variant: Variant) -> list[Sent]:
        return [one for one in self.counted(variant) if one.ending == "completed"]

    def endings(self, variant: Variant) -> Counter[Ending]:
        return Counter(one.ending for one in self.counted(variant))

    def positions(self, variant: Variant) -> Counter[Cache]:
        """Completed requests by their position of the dial."""
        return Counter(one.cache for one in self.completed(variant) if one.cache)


class DegradeCommand(CommandLine):
    """Measure what an overloaded server answers in time, with and without --degrade-at.

    python -m benchmarks.server.degrade --out degrade.json                               the demo model, on one thread
    python -m benchmarks.server.degrade --out degrade.json --bundle DIR --limit 60       another model

    Two servers, which differ in that setting alone, take turns; the other one is idle. First it is counted how many
    requests the one without it completes per second. Then, in each round, twice as many arrive at each server at
    random, at the same moments, whatever is still open. Each has a time limit, and leaves the cache to the server.
    """

    model_config = SettingsConfigDict(cli_prog_name=_PROGRAM)

    out: Path = Field(description="JSON file to write the results to")
    bundle: Path = Field(Path("engines/demo"), description="bundle of the model")
    threads: PositiveInt = Field(1, description="CPU threads of each server; leave a core to the client")
    steps: PositiveInt | None = Field(None, description="denoising steps; the model's default unless given")
    overload: float = Field(2.0, gt=0, description="arrivals as a multiple of what the server completes")
    degrade_at: Seconds = Field(1.0, description="the setting that is compared with none")
    max_waiting: PositiveInt = Field(12, description="queue length of both servers, beyond which they refuse")
    limit: Seconds = Field(10.0, description="time limit of each request in seconds")
    rounds: PositiveInt = Field(3, description="loads of each server")
    warm_up: Seconds = Field(10.0, description="seconds of each load before those that count")
    seconds: Seconds = Field(60.0, description="seconds of each load that count")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(DegradeCommand, words)
    run = begin_run([*_PROGRAM.split(), *words])
    try:
        with ExitStack() as stack:
            urls = {variant: stack.enter_context(_server(variant, options)).url for variant in VARIANTS}
            found = asyncio.run(_measure(urls, options, run))
    except (ServerStartError, LoadTestError, OSError, httpx.HTTPError) as error:
        complain(error)
        return 2
    write_atomically(options.out, found.model_dump_json(indent=1).encode())
    table_console(120).print(table(found))
    return 0


def _server(variant: Variant, options: DegradeCommand) -> ServerProcess:
    more = ("--degrade-at", str(options.degrade_at)) if variant == "degrading" else ()
    common = ("--bundle", str(options.bundle), "--threads", str(options.threads))
    return ServerProcess(server_command(*common, "--max-waiting", str(options.max_waiting), *more))


async def _measure(urls: Mapping[Variant, str], options: DegradeCommand, run: Run) -> DegradeResults:
    async with ServerClient(urls["plain"], timeout=600) as client:
        model = (await client.models())[0]
        fields = {"prompt": _PROMPT, "num_inference_steps": options.steps or model["num_inference_steps"]}
        capacity = await _capacity(client, options, fields, users=_CROWD * max(model["max_rows"] // 2, 1))
    rate = options.overload * capacity
    loads = []
    for number, variant in turns(options.rounds):
        due = [one.at for one in poisson(rate=rate, seconds=_whole(options), steps=(1, 1), seed=number)]
        sent = await _load(urls[variant], {**fields, "timeout_s": options.limit}, due)
        loads.append(Load(variant=variant, round=number, requests=sent))
    return DegradeResults(
        run=run.model_copy(update={"ended": now()}),
        model=model["name"],
        steps=fields["num_inference_steps"],
        capacity=capacity,
        rate=rate,
        limit=options.limit,
        degrade_at=options.degrade_at,
        max_waiting=options.max_waiting,
        warm_up=options.warm_up,
        seconds=options.seconds,
        loads=tuple(loads),
    )


def turns(rounds: int) -> Iterator[tuple[int, Variant]]:
    """The loads in their order: both servers in each round, each of them first in every other one."""
    for number in range(rounds):
        for variant in VARIANTS if number % 2 == 0 else VARIANTS[::-1]:
            yield number, variant


def _whole(options: DegradeCommand) -> float:
    return options.warm_up + options.seconds


async def _capacity(client: ServerClient, options: DegradeCommand, fields: Mapping[str, Any], *, users: int) -> float:
    """Requests per second that are completed while more are open than fit into a step. Raises LoadTestError."""
    mix = Mix((MixEntry(name="an image", weight=1, fields=dict(fields)),), seed=1)
    generator = LoadGenerator(
        client, mix, idle_latencies=(1.0,), latency_targets=(options.limit,), on_request=lambda _request: None
    )
    load = LoadLevel(users=users, warm_up=options.warm_up, seconds=options.seconds)
    found = (await generator.run(load, 0, lambda _seconds: None)).point
    if not found.throughput or found.other_failures:
        raise LoadTestError(f"The capacity cannot be measured: {found.outcomes}. Measure for more --seconds.")
    return found.throughput


async def _load(url: str, fields: Mapping[str, Any], due: Sequence[float]) -> tuple[Sent, ...]:
    """Send a request at each moment, whatever is still open. Raises LoadTestError where one ends in another way."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as http:
        began = time.perf_counter()

        async def send(number: int, at: float) -> Sent:
            answer = await http.post("/generate", json={**fields, "seed": number})
            ended = round(time.perf_counter() - began, _DIGITS)
            return Sent(due=round(at, _DIGITS), ended=ended, ending=_ending(answer), cache=_position(answer))

        async with asyncio.TaskGroup() as group:
            tasks = []
            for number, at in enumerate(due):
                await asyncio.sleep(max(at - (time.perf_counter() - began), 0.0))
                tasks.append(group.create_task(send(number, at)))
    return tuple(task.result() for task in tasks)


def _ending(answer: httpx.Response) -> Ending:
    if answer.status_code not in _ENDINGS:
        raise LoadTestError(f"A request got {answer.status_code}: {answer.text[:200]}")
    return _ENDINGS[answer.status_code]


def _position(answer: httpx.Response) -> Cache | None:
    if answer.status_code != 200:
        return None
    position: Cache = answer.json()["parameters"]["cache"]
    return position


def table(found: DegradeResults) -> Table:
    made = Table(title=f"{found.model}, {found.steps} steps, {found.rate:.2f} requests/s")
    headings = ("", "goodput/s", "refused", "expired", "p50", "p99", *POSITIONS)
    for heading in headings:
        made.add_column(heading)
    for variant in VARIANTS:
        name = "without" if variant == "plain" else f"--degrade-at {found.degrade_at:g}"
        made.add_row(name, f"{found.goodput(variant):.2f}", *_shares(found, variant))
    made.caption = f"capacity {found.capacity:.2f} requests/s; goodput: completed within {found.limit:g} s"
    return made


def _shares(found: DegradeResults, variant: Variant) -> Iterator[str]:
    """Refusals and expiries of all requests, latencies of those completed, and their positions."""
    total, endings = len(found.counted(variant)), found.endings(variant)
    done = found.completed(variant)
    for ending in ("refused", "expired"):
        yield f"{endings[ending] / total:.0%}" if total else ""
    for q in (50, 99):
        yield seconds(float(np.percentile([one.latency for one in done], q))) if done else ""
    positions = found.positions(variant)
    for position in POSITIONS:
        yield f"{positions[position] / len(done):.0%}" if done else ""


if __name__ == "__main__":
    sys.exit(main())
