"""Compares the capacity that the curve of step times predicts with what a server makes under load."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Protocol

import httpx
import numpy as np
from pydantic import Field, PositiveInt
from pydantic_settings import SettingsConfigDict
from rich.table import Table

from benchmarks.cli import Seconds, complain, table_console
from benchmarks.process import ServerProcess, ServerStartError, server_command
from engines.cli import CommandLine, parse
from engines.files import write_atomically
from loadtest.analysis.capacity import Capacity, Work, read_curve
from loadtest.analysis.results import LoadLevel, LoadMetrics
from loadtest.charts import seconds
from loadtest.client import LoadTestError, ServerClient
from loadtest.generator import LoadGenerator
from loadtest.mix import Mix, MixEntry
from loadtest.provenance import ResultModel, Run, begin_run, now

_PROGRAM = "python -m benchmarks.server.capacity"
_PROMPT = "a red heart on a yellow background"
_REPEATS = 3  # requests of each row count, alone, so that the curve is of steps under these conditions
_CROWD = 2  # users for each image that fits into a step, so that one waits for each that runs


class CapacityResults(ResultModel):
    """The results file."""

    run: Run
    model: str
    size: str
    curve: dict[int, float] = Field(description="seconds of a step by its rows, before the load")
    work: Work
    predicted: Capacity
    idle_latency: float = Field(description="seconds of a request alone")
    saturated: LoadMetrics = Field(description="a closed loop of twice as many users as fit into a step")
    utilization: float = Field(description="of the predicted capacity, at which requests then arrived")
    loaded: LoadMetrics = Field(description="Poisson arrivals at that rate")

    @property
    def error(self) -> float:
        """By how much the measured throughput differs from the predicted one, as a share of it."""
        return self.saturated.throughput / self.predicted.images_per_second - 1


class CapacityCommand(CommandLine):
    """Predict a server's capacity from its curve of step times, and measure it.

    python -m benchmarks.server.capacity --out capacity.json                             the demo model, on one thread
    python -m benchmarks.server.capacity --out capacity.json --url http://node:8000      a running server without load

    Requests have one image, with the default guidance. It takes a minute, and --seconds of each of two loads.
    """

    model_config = SettingsConfigDict(cli_prog_name=_PROGRAM)

    out: Path = Field(description="JSON file to write the results to")
    url: str | None = Field(None, description="a running server; the demo model is served unless given")
    steps: PositiveInt | None = Field(None, description="denoising steps; the model's default unless given")
    utilization: Annotated[float, Field(gt=0, le=1)] = Field(
        0.7, description="share of the predicted capacity at which requests arrive in the second load"
    )
    seconds: Seconds = Field(60.0, description="seconds of each load that count")
    warm_up: Seconds = Field(10.0, description="seconds of each load before those that count")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(CapacityCommand, words)
    run = begin_run([*_PROGRAM.split(), *words])
    try:
        with _server(options.url) as server:
            found = asyncio.run(_measure(server.url, options, run))
    except (ServerStartError, LoadTestError, OSError, ValueError, httpx.HTTPError) as error:
        complain(error)
        return 2
    write_atomically(options.out, found.model_dump_json(indent=1).encode())
    table_console(120).print(_table(found))
    return 0


class _Served(Protocol):
    url: str


def _server(url: str | None) -> AbstractContextManager[_Served]:
    """The server at `url`, or one of our own, which leaves a core of two to the client."""
    if url:
        return nullcontext(SimpleNamespace(url=url.rstrip("/")))
    return ServerProcess(server_command("--threads", "1"))


async def _measure(url: str, options: CapacityCommand, run: Run) -> CapacityResults:
    """The curve and the work of an image on an idle server, then both loads."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as http, ServerClient(url, timeout=300) as client:
        await client.check_ready()
        model = (await client.models())[0]
        fields = {"prompt": _PROMPT, "num_inference_steps": options.steps or model["num_inference_steps"]}
        work, idle_latency = await _measure_alone(http, model, fields)
        size = str(model["resolutions"][0])
        curve = read_curve((await http.get("/metrics")).text, model=model["name"], size=size)
        predicted = Capacity.of(curve, work)
        users = _CROWD * max(predicted.rows // work.rows, 1)
        rate = options.utilization * predicted.images_per_second
        timing = {"warm_up": options.warm_up, "seconds": options.seconds}
        mix = Mix((MixEntry(name="an image", weight=1, fields=fields),), seed=1)
        generator = LoadGenerator(
            client,
            mix,
            idle_latencies=(idle_latency,),
            latency_targets=(idle_latency * 4,),
            on_request=lambda _request: None,
        )
        saturated = await generator.run(LoadLevel(users=users, **timing), 0, lambda _seconds: None)
        loaded = await generator.run(LoadLevel(rate=rate, **timing), 1, lambda _seconds: None)
    return CapacityResults(
        run=run.model_copy(update={"ended": now()}),
        model=model["name"],
        size=size,
        curve=curve,
        work=work,
        predicted=predicted,
        idle_latency=idle_latency,
        saturated=_whole(saturated.point),
        utilization=options.utilization,
        loaded=_whole(loaded.point),
    )


async def _measure_alone(http: httpx.AsyncClient, model: dict[str, Any], fields: dict[str, Any]) -> tuple[Work, float]:
    """What an image costs, and the seconds of a request for one, on an idle server.

    Requests of 1, 2, 4 … images alone also bring the curve up to date, which has two points after a start.
    """
    rows = 2 if model["guidance_scale"] > 1 else 1
    singles: list[dict[str, float]] = []
    for images in _doublings(max(model["max_rows"] // rows, 1)):
        for _ in range(_REPEATS):
            answer = await http.post("/generate", json={**fields, "num_images": images})
            answer.raise_for_status()
            if images == 1:
                singles.append(answer.json()["timings"])
    encode_decode = float(np.median([one["encode"] + one["decode"] for one in singles]))
    work = Work(rows=rows, steps=fields["num_inference_steps"], encode_decode=encode_decode)
    return work, float(np.median([one["total"] for one in singles]))


def _doublings(most: int) -> list[int]:
    """1, 2, 4 … up to `most`, and `most` itself."""
    return sorted({most, *(2**power for power in range(most.bit_length()))} - {0})


def _whole(point: LoadMetrics) -> LoadMetrics:
    """The metrics, if every counted request has an image. Raises LoadTestError."""
    if point.lost is not None or point.outcomes["completed"] != point.requests or not point.requests:
        raise LoadTestError(
            f"Not every request had an image at {point.load.label}: {point.outcomes}. Use an idle server."
        )
    return point.model_copy(update={"samples": ()})


def _table(found: CapacityResults) -> Table:
    made = Table(title=f"{found.model}, {found.size}, {found.work.steps} steps, {found.work.rows} rows an image")
    for heading in ("", "images/s", "rows per step", "p50", "p95"):
        made.add_column(heading)
    predicted = f"{found.predicted.images_per_second:.2f}"
    made.add_row("predicted, full steps", predicted, str(found.predicted.rows), "", "")
    made.add_row(f"{found.saturated.load.label}, closed loop", *_cells(found.saturated))
    made.add_row(f"{found.utilization:.0%} of the prediction, Poisson", *_cells(found.loaded))
    made.add_row("alone", "", str(found.work.rows), seconds(found.idle_latency), "")
    made.caption = f"measured compared with predicted: {found.error:+.1%}"
    return made


def _cells(point: LoadMetrics) -> tuple[str, ...]:
    steps = sum(point.step_rows.values())
    rows = sum(count * number for count, number in point.step_rows.items()) / steps if steps else 0.0
    latency = (seconds(point.latency.p50), seconds(point.latency.p95)) if point.latency else ("", "")
    return f"{point.throughput:.2f}", f"{rows:.1f}", *latency


if __name__ == "__main__":
    sys.exit(main())
