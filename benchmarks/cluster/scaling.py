"""Measures 1, 2 and 3 real servers on this machine behind nginx: throughput, latency, and how even the load is.

python -m benchmarks.cluster.scaling --out scaling.json
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import Field, PositiveInt
from pydantic_settings import SettingsConfigDict
from rich.table import Table

from benchmarks.cli import Seconds, complain, table_console
from benchmarks.cluster.nginx import nginx
from benchmarks.process import ServerProcess, ServerStartError, server_command
from engines.cli import CommandLine, Repeatable, parse
from engines.files import write_atomically
from loadtest.analysis.results import LoadLevel, LoadMetrics, Percentiles, RequestRecord
from loadtest.charts import seconds
from loadtest.client import LoadTestError
from loadtest.command_line import LoadTestOptions
from loadtest.mix import MixError
from loadtest.provenance import ResultModel, Run, begin_run, now
from loadtest.runner import measure

_PROGRAM = "python -m benchmarks.cluster.scaling"
_PROMPT = "a red heart on a yellow background"

Device = Literal["cpu", "timed"]
DEVICES: dict[Device, tuple[str, int]] = {  # the module of the server, and the steps of a request
    "cpu": ("server", 4),
    "timed": ("benchmarks.cluster.timed_engine", 20),
}


class LoadFigures(ResultModel):
    """Requests of one image under one load."""

    load: LoadLevel
    requests: int
    without_image: int = Field(description="refused, failed, or not answered in time")
    images_per_second: float
    latency: Percentiles | None
    by_server: tuple[int, ...] = Field(description="images of each server, warm-up included; empty if unknown")


class Arrangement(ResultModel):
    """Some servers, what was before them, and what they did."""

    device: Device | None = Field(
        description="cpu: the demo model on one thread each; timed: steps that only take time"
    )
    front: str = Field(description="nginx; none; or a URL that was given")
    servers: int | None
    closed: LoadFigures
    open: LoadFigures = Field(description="Poisson arrivals at a part of the throughput of the closed loop")


class ScalingResults(ResultModel):
    """The results file."""

    run: Run
    share: float = Field(description="arrivals of the open loop, as a part of the throughput of the closed loop")
    arrangements: tuple[Arrangement, ...]


class ScalingCommand(CommandLine):
    """Measure 1, 2 and 3 servers on this machine behind nginx.

    python -m benchmarks.cluster.scaling --out scaling.json

    Servers with the demo model share the cores of this machine, so no more of them are faster than it has cores.
    Servers with steps that only take time show what nginx adds beyond that. It takes less than five minutes; run it on
    a machine with nothing else to do.
    """

    model_config = SettingsConfigDict(cli_prog_name=_PROGRAM)

    out: Path = Field(description="JSON file to write the results to")
    servers: Repeatable[PositiveInt] = Field((1, 2, 3), description="how many servers; may be repeated")
    device: Repeatable[Device] = Field(tuple(DEVICES), description="of the servers; may be repeated")
    url: Repeatable[str] = Field(
        (), description="measure what serves there too, such as Ray Serve with the demo model; may be repeated"
    )
    users: PositiveInt = Field(8, description="of the closed loop, for each server")
    share: float = Field(0.7, gt=0, lt=1, description="arrivals as a part of the throughput of the closed loop")
    seconds: Seconds = Field(12.0, description="of each load")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(ScalingCommand, words)
    run = begin_run([*_PROGRAM.split(), *words])
    try:
        found = tuple(_arrangements(options, run))
    except (ServerStartError, LoadTestError, MixError, OSError, ValueError) as error:
        complain(error)
        return 2
    results = ScalingResults(run=run.model_copy(update={"ended": now()}), share=options.share, arrangements=found)
    write_atomically(options.out, results.model_dump_json(indent=1).encode())
    table_console(120).print(_table(results))
    return int(any(one.closed.without_image or one.open.without_image for one in found))


def _arrangements(options: ScalingCommand, run: Run) -> Iterator[Arrangement]:
    for device in options.device:
        yield _measure_servers(options, run, device=device, count=1, front="none")
        for count in options.servers:
            yield _measure_servers(options, run, device=device, count=count, front="nginx")
    for url in options.url:
        measuring = _Measuring(options, run, url=url, servers=(), steps=DEVICES["cpu"][1], users=options.users)
        yield Arrangement(device=None, front=url, servers=None, **measuring.both())


def _measure_servers(
    options: ScalingCommand, run: Run, *, device: Device, count: int, front: Literal["none", "nginx"]
) -> Arrangement:
    """Start `count` servers, measure them behind `front`, and end them."""
    module, steps = DEVICES[device]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        command = server_command("--threads", "1", module=module)
        servers = [stack.enter_context(ServerProcess(command)).url for _ in range(count)]
        url = stack.enter_context(nginx(servers, folder)).url if front == "nginx" else servers[0]
        users = options.users * count
        measuring = _Measuring(options, run, url=url, servers=servers, steps=steps, users=users)
        return Arrangement(device=device, front=front, servers=count, **measuring.both())


class _Measuring:
    """Loads on one URL, which the load test makes."""

    def __init__(
        self, options: ScalingCommand, run: Run, *, url: str, servers: Sequence[str], steps: int, users: int
    ) -> None:
        self._options, self._run = options, run
        self._url, self._servers, self._steps, self._users = url, servers, steps, users

    def both(self) -> dict[str, LoadFigures]:
        """A closed loop, and then arrivals at a part of its throughput."""
        closed = self._load(users=(self._users,))
        if not closed.images_per_second:
            raise LoadTestError(f"No image came from {self._url} in {self._options.seconds:g} s: take more --seconds.")
        return {"closed": closed, "open": self._load(rate=(self._options.share * closed.images_per_second,))}

    def _load(self, *, users: tuple[int, ...] = (), rate: tuple[float, ...] = ()) -> LoadFigures:
        options = LoadTestOptions(
            url=self._url,
            server=tuple(self._servers),
            out=self._options.out,
            users=users,
            rate=rate,
            duration=self._options.seconds,
            warm_up=self._options.seconds / 4,
            prompt=(_PROMPT,),
            steps=self._steps,
        )
        before = [images_of(server) for server in self._servers]
        found = asyncio.run(measure(options, self._run, _Unobserved()))
        after = [images_of(server) for server in self._servers]
        return figures_of(found.points[0], [later - earlier for earlier, later in zip(before, after, strict=True)])


class _Unobserved:
    """An observer that shows nothing."""

    def begin_load(self, load: LoadLevel) -> Callable[[float], None]:  # noqa: ARG002 - the observer's signature
        return lambda _at: None

    def on_request(self, request: RequestRecord) -> None:
        """Its figures are all that counts."""


def figures_of(point: LoadMetrics, by_server: Sequence[int]) -> LoadFigures:
    return LoadFigures(
        load=point.load,
        requests=point.requests,
        without_image=point.requests - point.outcomes["completed"],
        images_per_second=point.throughput,
        latency=point.latency,
        by_server=tuple(by_server),
    )


def images_of(server: str) -> int:
    """The requests that a server has completed. Raises LoadTestError."""
    try:
        text = httpx.get(f"{server}/metrics", trust_env=False).raise_for_status().text
    except httpx.HTTPError as error:
        raise LoadTestError(f"{server} has no metrics any more: {error}") from None
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    return round(
        sum(
            one.value
            for one in samples
            if one.name == "latentd_requests_total" and one.labels.get("outcome") == "completed"
        )
    )


def _table(results: ScalingResults) -> Table:
    made = Table("device", "before them", "servers", "load", "images/s", "p50", "p95", "without image", "by server")
    for one in results.arrangements:
        for load in (one.closed, one.open):
            latency = [seconds(load.latency.p50), seconds(load.latency.p95)] if load.latency else ["–", "–"]
            counts = [str(load.without_image), ", ".join(map(str, load.by_server)) or "–"]
            place = [one.device or "–", one.front, str(one.servers or "–"), load.load.label]
            made.add_row(*place, f"{load.images_per_second:.2f}", *latency, *counts)
    return made


if __name__ == "__main__":
    sys.exit(main())
