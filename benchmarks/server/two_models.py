"""How two models share one server: what each gets of the device under load, and what unloading one of them loses."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from pydantic import Field, PositiveInt
from pydantic_settings import SettingsConfigDict
from rich.table import Table

from benchmarks.cli import Seconds, complain, table_console
from benchmarks.faults.callers import EVENTS, Answer, Caller, Tally
from benchmarks.process import START_SECONDS, ServerProcess, ServerStartError, free_port
from engines.cli import CommandLine, parse
from engines.files import write_atomically
from loadtest.analysis.results import LoadLevel, MeasuredLoad
from loadtest.charts import seconds
from loadtest.client import LoadTestError, ServerClient
from loadtest.generator import LoadGenerator
from loadtest.mix import Mix, MixEntry
from loadtest.provenance import ResultModel, Run, begin_run, now

_PROGRAM = "python -m benchmarks.server.two_models"
_DEMO = "engines/demo"
_PROMPT = "a red heart on a yellow background"
_LEAST = 0.4  # of its throughput alone that each model keeps when both are busy; half would be an equal share
_POLL = 0.1  # seconds between questions whether a model is loaded


class ModelFigures(ResultModel):
    """A model's requests under the same number of users, alone and while the other is as busy. Times in seconds."""

    name: str
    images: int = Field(description="of each request: the steps of a request with more take longer")
    alone: tuple[float, ...] = Field(description="latencies of completed requests")
    shared: tuple[float, ...]
    rate_alone: float = Field(description="requests per second")
    rate_shared: float

    @property
    def kept(self) -> float:
        """The share of its throughput alone: of the device's time, where both are busy."""
        return self.rate_shared / self.rate_alone if self.rate_alone else 0.0


class Reloads(ResultModel):
    """What the callers of both models met while one was unloaded and loaded again and again."""

    times: int = Field(description="it was unloaded, and ready again")
    endings: dict[str, dict[str, int]] = Field(description="of requests, by model")
    lost: tuple[str, ...] = Field(description="requests that were accepted and got no image, and those without answer")


class TwoModelsResults(ResultModel):
    """The results file."""

    run: Run
    users: int = Field(description="of each model, each with one request after the other")
    models: tuple[ModelFigures, ...]
    reloads: Reloads

    @property
    def holds(self) -> bool:
        return min(model.kept for model in self.models) >= _LEAST and not self.reloads.lost


class TwoModelsCommand(CommandLine):
    """Measure how two models share one server: throughput of each alone and together, and requests lost to unloading.

    python -m benchmarks.server.two_models --out two-models.json

    The demo model is served under two names; requests of the second have four images, so their steps take longer. The
    exit code is 1 if a model keeps less than 40 % of its throughput, or a request is lost. Run it on a machine with
    nothing else to do.
    """

    model_config = SettingsConfigDict(cli_prog_name=_PROGRAM)

    out: Path = Field(description="JSON file to write the results to")
    first: Path = Field(Path(_DEMO), description="bundle of the first model")
    second: Path = Field(Path(_DEMO), description="bundle of the second model")
    images: PositiveInt = Field(4, description="images of a request of the second model")
    users: PositiveInt = Field(4, description="users of each model")
    steps: PositiveInt = Field(20, description="denoising steps")
    seconds: Seconds = Field(20.0, description="seconds of each part that count")
    warm_up: Seconds = Field(3.0, description="seconds of each part before those that count")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(TwoModelsCommand, words)
    run = begin_run([*_PROGRAM.split(), *words])
    port = free_port()
    bundles = [f"--bundle=first={options.first}", f"--bundle=second={options.second}"]
    try:
        with ServerProcess([sys.executable, "-m", "server", "--port", str(port), *bundles], port=port) as server:
            found = asyncio.run(_measure(server.url, options, run))
    except (ServerStartError, LoadTestError, OSError, httpx.HTTPError) as error:
        complain(error)
        return 2
    write_atomically(options.out, found.model_dump_json(indent=1).encode())
    console = table_console(120)
    console.print(_table(found))
    console.print(_reloads_line(found.reloads), highlight=False, soft_wrap=True)
    return int(not found.holds)


async def _measure(url: str, options: TwoModelsCommand, run: Run) -> TwoModelsResults:
    """Each model alone, both, and both while the second is unloaded and loaded."""
    wanted = {"first": _fields(options, "first", 1), "second": _fields(options, "second", options.images)}
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        for name in wanted:
            await _until_ready(http, name)
    alone = [await _load(url, options, fields) for fields in wanted.values()]
    shared = await asyncio.gather(*(_load(url, options, fields) for fields in wanted.values()))
    figures = tuple(
        ModelFigures(
            name=name,
            images=fields["num_images"],
            alone=_latencies(one),
            shared=_latencies(both),
            rate_alone=one.point.throughput,
            rate_shared=both.point.throughput,
        )
        for (name, fields), one, both in zip(wanted.items(), alone, shared, strict=True)
    )
    reloads = await _reload(url, options, wanted)
    return TwoModelsResults(
        run=run.model_copy(update={"ended": now()}), users=options.users, models=figures, reloads=reloads
    )


def _fields(options: TwoModelsCommand, model: str, images: int) -> dict[str, Any]:
    return {"model": model, "prompt": _PROMPT, "num_inference_steps": options.steps, "num_images": images}


async def _load(url: str, options: TwoModelsCommand, fields: Mapping[str, Any]) -> MeasuredLoad:
    """A closed loop of users. Raises LoadTestError where a request fails."""
    mix = Mix((MixEntry(name=str(fields["model"]), weight=1, fields=dict(fields)),), seed=1)
    level = LoadLevel(users=options.users, warm_up=options.warm_up, seconds=options.seconds)
    async with ServerClient(url, timeout=120) as client:
        generator = LoadGenerator(
            client, mix, idle_latencies=(1.0,), latency_targets=(1.0,), on_request=lambda _request: None
        )
        measured = await generator.run(level, 0, lambda _seconds: None)
    for request in measured.requests:
        if request.outcome != "completed":
            raise LoadTestError(f"A request of {fields['model']} was {request.outcome}: {request.detail}")
    if not _latencies(measured):
        raise LoadTestError(
            f"No request of {fields['model']} counts: measure for more --seconds, or take fewer --steps."
        )
    return measured


def _latencies(measured: MeasuredLoad) -> tuple[float, ...]:
    return tuple(request.latency for request in measured.requests if request.counted)


async def _reload(url: str, options: TwoModelsCommand, wanted: Mapping[str, Mapping[str, Any]]) -> Reloads:
    """Users of both models ask while the second one is unloaded and loaded."""
    tallies = {name: Tally() for name in wanted}
    over = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for name, fields in wanted.items():
            for _ in range(options.users):
                group.create_task(_ask_until(over, Caller(url, tallies[name]), fields))
        try:
            times = await _unload_and_load(url, "second", seconds=options.seconds)
        finally:
            over.set()
    losses = [loss(name, answer) for name, tally in tallies.items() for answer in tally.answers]
    return Reloads(
        times=times,
        endings={name: dict(tally.endings) for name, tally in tallies.items()},
        lost=tuple(filter(None, losses)),
    )


async def _ask_until(over: asyncio.Event, caller: Caller, fields: Mapping[str, Any]) -> None:
    while not over.is_set():
        answer = await caller.ask(fields, accept=EVENTS)
        if answer.ending != "completed":
            await asyncio.sleep(_POLL)


async def _unload_and_load(url: str, name: str, *, seconds: float) -> int:
    """How often, in at least so many seconds."""
    times = 0
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while loop.time() < end:
            await asyncio.sleep(1)  # of work between
            (await http.post(f"/v2/repository/models/{name}/unload")).raise_for_status()
            (await http.post(f"/v2/repository/models/{name}/load")).raise_for_status()
            await _until_ready(http, name)
            times += 1
    return times


async def _until_ready(http: httpx.AsyncClient, name: str) -> None:
    """Wait until requests for a model are accepted. Raises httpx.HTTPError, LoadTestError."""
    for _ in range(round(START_SECONDS / _POLL)):
        if (await http.get(f"/v2/models/{name}/ready")).status_code == 200:
            return
        await asyncio.sleep(_POLL)
    raise LoadTestError(f"The model {name} was not ready within {START_SECONDS:.0f} s.")


def loss(model: str, answer: Answer) -> str:
    """What was lost, in a few words; empty for an image, and for a refusal, which is no stream of events."""
    if answer.ending == "completed" or (answer.ending in ("unavailable", "refused") and answer.status != 200):
        return ""
    return f"{model}: {answer.ending}, status {answer.status}: {answer.body[-200:]!r}"


def _table(found: TwoModelsResults) -> Table:
    made = Table(title=f"two models in one server, {found.users} users of each")
    for heading in ("model", "images of a request", "alone", "both", "keeps", "p95 alone", "p95 both"):
        made.add_column(heading)
    for model in found.models:
        made.add_row(
            model.name,
            str(model.images),
            f"{model.rate_alone:.2f}/s",
            f"{model.rate_shared:.2f}/s",
            f"{model.kept:.0%}",
            *(seconds(float(np.percentile(times, 95))) for times in (model.alone, model.shared)),
        )
    made.caption = f"an equal share of the device is 50 %; bound: {_LEAST:.0%}"
    return made


def _reloads_line(reloads: Reloads) -> str:
    totals = Counter[str]()
    for endings in reloads.endings.values():
        totals.update(endings)
    ended = ", ".join(f"{count} {ending}" for ending, count in totals.items())
    lost = "none was lost" if not reloads.lost else f"LOST: {'; '.join(reloads.lost)}"
    return f"the second model was unloaded and loaded {reloads.times} times: {ended}; {lost}"


if __name__ == "__main__":
    sys.exit(main())
