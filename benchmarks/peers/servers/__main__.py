"""Compares servers under load: ours, and two that people build on diffusers, with the same weights and requests."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

import httpx
import numpy as np
import PIL.Image
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, ValidationError
from pydantic_settings import SettingsConfigDict
from rich.console import Console
from rich.markup import escape

from benchmarks.cli import Seconds, complain, table_console
from benchmarks.peers.servers.report import chart, table
from benchmarks.peers.servers.results import (
    SCENARIOS,
    SLO,
    YARDSTICK,
    Scenario,
    ScenarioResult,
    ServerResult,
    ServingResults,
    ServingSettings,
    entries,
)
from benchmarks.process import ROOT, ServerProcess, ServerStartError, free_port
from engines.accuracy import psnr
from engines.backends.available import unavailable_reason
from engines.cli import CommandLine, RepeatableList, parse
from engines.files import write_atomically
from loadtest.analysis.results import LoadLevel, RequestRecord
from loadtest.client import LoadTestError, ServerClient
from loadtest.generator import LoadGenerator, measure_idle_latencies
from loadtest.provenance import begin_run, now

_PACKAGES = ("torch", "diffusers", "transformers", "fastapi", "uvicorn", "litserve")
_ALIKE = 35.0  # dB: images that differ more are not of the same request
_WAIT = 60.0  # seconds beyond what the yardstick would take for all requests, before the client gives up
_SEED = 7  # of the images that are compared
_CONSOLE_WIDTH = 160
_VERSIONS = (
    "import json, sys\nfrom importlib import metadata\nfound = {}\nfor name in sys.argv[1:]:\n"
    "    try:\n        found[name] = metadata.version(name)\n"
    "    except metadata.PackageNotFoundError:\n        pass\nprint(json.dumps(found))"
)
Pixels = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ComparedServer:
    """A server to compare. `needs` are packages of the peers' interpreter; ours are named by their backend."""

    name: str
    title: str
    needs: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        return not self.needs


_DIFFUSERS = ("torch", "diffusers", "transformers")
SERVERS = (
    ComparedServer("fastapi", "FastAPI, diffusers and a lock", (*_DIFFUSERS, "fastapi", "uvicorn")),
    ComparedServer("litserve", "LitServe, diffusers, batches of requests", (*_DIFFUSERS, "litserve")),
    ComparedServer("onnxruntime", "latentd, ONNX Runtime"),
    ComparedServer("openvino", "latentd, OpenVINO"),
)
_TITLES = tuple((server.name, server.title) for server in SERVERS)


class ServersCommand(CommandLine):
    """Compare servers under load: ours, and two that people build on diffusers, with the same weights and requests.

    python -m benchmarks.peers.servers --out DIR --peers-python VENV/bin/python     all of them
    python -m benchmarks.peers.servers --out DIR --only fastapi onnxruntime         some of them
    python -m benchmarks.peers.servers --out DIR --resume --only openvino           add one, or measure one again

    They serve the demo model, one after the other, each alone on the machine. The FastAPI server is the yardstick:
    request rates follow from its latency when idle, and goodput counts responses within four times that.

    Results go to DIR/serving.json, DIR/serving.md and DIR/serving.svg, and each request to DIR/requests-….jsonl. The
    exit code is 1 if servers generate different images, and 2 if nothing could be measured.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m benchmarks.peers.servers")

    out: Path = Field(description="folder for results")
    only: RepeatableList[Literal["fastapi", "litserve", "onnxruntime", "openvino"]] = Field(
        (), description="servers to measure, even if --resume finds their results"
    )
    peers_python: str = Field(sys.executable, description="interpreter with the packages in requirements.txt")
    scenario: RepeatableList[Scenario] = Field(SCENARIOS, description="kinds of requests to send")
    rate: RepeatableList[Seconds] = Field(
        (0.5, 1.0, 2.0), description="request rates, as shares of what the yardstick serves one after the other"
    )
    duration: Seconds = Field(40.0, description="seconds measured at each rate")
    warm_up: Seconds = Field(3.0, description="seconds before those, which are not counted")
    steps: PositiveInt = Field(20, description="denoising steps of a request; mixed requests also have half and 1.5×")
    threads: PositiveInt = Field(len(os.sched_getaffinity(0)), description="CPU threads of each server")
    seed: int = Field(0, description="seed of arrival times and images")
    resume: bool = Field(False, description="keep results in OUT, and measure what is missing")

    @property
    def scenarios(self) -> tuple[Scenario, ...]:
        return tuple(scenario for scenario in SCENARIOS if scenario in self.scenario)

    @property
    def settings(self) -> ServingSettings:
        return ServingSettings(
            rates=tuple(sorted(set(self.rate))),
            seconds=self.duration,
            warm_up=self.warm_up,
            steps=self.steps,
            threads=self.threads,
            seed=self.seed,
        )


@dataclass(slots=True)
class ServerComparison:
    """Measures servers one after the other."""

    options: ServersCommand
    record: ServingResults
    console: Console
    images: dict[tuple[Scenario, int], Pixels] = field(default_factory=dict)  # the yardstick's

    def measure(self, server: ComparedServer) -> ServerResult:
        """Start `server`, put every load on it, and stop it. Where that fails, the result has a note that says why."""
        run = len(self.record.runs) - 1
        if reason := self._missing(server):
            return ServerResult(server=server.name, run=run, note=reason)
        self.console.print(f"{server.title} …", style="dim", highlight=False)
        port = free_port()
        log = self.options.out / f"{server.name}.log"
        try:
            with ServerProcess(
                self._command(server, port),
                port=port,
                log=log,
                variables={"HF_HUB_OFFLINE": "1"},
                sample_memory=True,
            ) as process:
                similarity = self._compare(server, process.url)
                loads = asyncio.run(self._put_loads(server, process.url))
                took = {"ready_after": process.ready_after, "memory": process.peak_memory or None}
                return ServerResult(server=server.name, run=run, psnr=similarity, loads=loads, **took)
        except (ServerStartError, LoadTestError, httpx.HTTPError) as error:
            return ServerResult(server=server.name, run=run, note=str(error) or type(error).__name__)

    def save(self) -> None:
        out = self.options.out
        write_atomically(out / "serving.json", self.record.model_dump_json(indent=1).encode())
        write_atomically(out / "serving.md", table(self.record, _TITLES).encode())
        write_atomically(out / "serving.svg", chart(self.record, _TITLES).encode())

    def _missing(self, server: ComparedServer) -> str:
        """Why it cannot be measured here, and what to do; empty if it can."""
        if lacking := [name for name in server.needs if name not in self.record.peers]:
            return f"not installed: {self.options.peers_python} -m pip install {' '.join(lacking)}"
        if server.name != YARDSTICK and any(self.record.idle(scenario) is None for scenario in self.options.scenarios):
            return f"its request rates follow from {YARDSTICK}, which was not measured: add it to --only or --resume."
        return (unavailable_reason(server.name) or "") if server.ours else ""

    def _command(self, server: ComparedServer, port: int) -> list[str]:
        shared = ["--port", str(port), "--threads", str(self.options.settings.threads)]
        if server.ours:
            return [sys.executable, "-m", "server", "--backend", server.name, "--log-level", "warning", *shared]
        module, checkpoint = (
            f"benchmarks.peers.servers.{server.name}_server",
            (self.options.out / "checkpoint").resolve(),
        )
        return [self.options.peers_python, "-m", module, "--checkpoint", str(checkpoint), *shared]

    def _compare(self, server: ComparedServer, url: str) -> float | None:
        """Generate an image of each entry. Returns the lowest PSNR compared with the yardstick's, None for itself."""
        found: list[float] = []
        with httpx.Client(base_url=url, timeout=_WAIT, trust_env=False) as client:
            for scenario in self.options.scenarios:
                for number, entry in enumerate(self.record.scenarios[scenario]):
                    pixels = _generate(client, {**entry.fields, "seed": _SEED})
                    if server.name == YARDSTICK:
                        self.images[scenario, number] = pixels
                        write_atomically(self._image(scenario, number), _file_of(pixels))
                    else:
                        found.append(psnr(pixels, self._yardstick(scenario, number)))
        return min(found, default=None)

    def _yardstick(self, scenario: Scenario, number: int) -> Pixels:
        if (scenario, number) not in self.images:
            self.images[scenario, number] = _pixels(self._image(scenario, number).read_bytes())
        return self.images[scenario, number]

    def _image(self, scenario: Scenario, number: int) -> Path:
        return self.options.out / f"yardstick-{scenario}-{number}.png"

    async def _put_loads(self, server: ComparedServer, url: str) -> tuple[ScenarioResult, ...]:
        loads: list[ScenarioResult] = []
        with (self.options.out / f"requests-{server.name}.jsonl").open("w", encoding="utf-8") as file:
            for scenario in self.options.scenarios:
                loads.append(await self._put(scenario, url, file))
        return tuple(loads)

    async def _put(self, scenario: Scenario, url: str, file: TextIO) -> ScenarioResult:
        """Send a scenario's requests at every rate. Loads are numbered through all scenarios."""
        settings, mix = self.options.settings, self.record.mix(scenario)
        first = self.options.scenarios.index(scenario) * len(settings.rates)
        async with ServerClient(
            url, timeout=_WAIT + max(settings.rates) * (settings.warm_up + settings.seconds)
        ) as client:
            alone = await measure_idle_latencies(client, mix)
            idle = self.record.idle(scenario) or mix.mean(alone)  # this is the yardstick itself
            targets = (SLO * idle,) * len(mix.entries)
            generator = LoadGenerator(
                client, mix, idle_latencies=alone, latency_targets=targets, on_request=_writer(file)
            )
            points = []
            for number, share in enumerate(settings.rates, first):
                load = LoadLevel(rate=share / idle, warm_up=settings.warm_up, seconds=settings.seconds)
                points.append((await generator.run(load, number, _no_progress)).point)
        return ScenarioResult(scenario=scenario, alone=alone, points=tuple(points))


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(ServersCommand, words)
    console = table_console(_CONSOLE_WIDTH)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        comparison = ServerComparison(options, _record(options), console)
        comparison.record.runs.append(begin_run(["python", "-m", "benchmarks.peers.servers", *words]))
        due = [server for server in SERVERS if _is_due(server, options, comparison.record)]
        if any(not server.ours for server in due):
            _restore_checkpoint(options.out / "checkpoint")
        for server in due:
            if server.name == YARDSTICK:
                comparison.record.results = []  # their rates followed from the old yardstick
            comparison.record.put(result := comparison.measure(server))
            comparison.save()
            if result.note:
                console.print(f"{server.name}: not measured: {escape(result.note)}", style="yellow", soft_wrap=True)
    except (LoadTestError, OSError) as error:
        complain(error)
        return 2
    comparison.record.runs[-1] = comparison.record.runs[-1].model_copy(update={"ended": now()})
    comparison.save()
    console.print(table(comparison.record, _TITLES), markup=False, highlight=False, soft_wrap=True)
    return judge(comparison.record, console)


def judge(record: ServingResults, console: Console) -> int:
    """The exit code."""
    if not any(result.loads for result in record.results):
        return 2
    others = [result for result in record.results if result.psnr is not None and result.psnr < _ALIKE]
    for result in others:
        console.print(f"{result.server} draws other images: {result.psnr:.1f} dB", style="bold red")
    return int(bool(others))


def _is_due(server: ComparedServer, options: ServersCommand, record: ServingResults) -> bool:
    """Whether to measure it: it is named, or has no results yet."""
    if options.only:
        return server.name in options.only
    found = record.find(server.name)
    return found is None or not found.loads


def _record(options: ServersCommand) -> ServingResults:
    """The results to continue, or new ones. Raises LoadTestError."""
    path = options.out / "serving.json"
    peers = _versions(options.peers_python)
    scenarios = {scenario: entries(scenario, options.settings.steps) for scenario in options.scenarios}
    begun = ServingResults(settings=options.settings, scenarios=scenarios, peers=peers)
    if not (options.resume and path.exists()):
        return begun
    try:
        kept = ServingResults.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise LoadTestError(
            f"{path} is not a results file of this command: choose another --out, or leave out --resume. {error}"
        ) from None
    if (kept.settings, kept.scenarios) != (begun.settings, begun.scenarios):
        raise LoadTestError(f"{path} was measured with other options: choose another --out, or leave out --resume.")
    kept.peers = peers
    return kept


def _versions(python: str) -> dict[str, str]:
    """Versions of the peers' packages in their interpreter. Raises LoadTestError where it does not run."""
    try:
        done = subprocess.run(  # noqa: S603 - named by the user
            [python, "-c", _VERSIONS, *_PACKAGES], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise LoadTestError(f"{python} does not run: give the interpreter with --peers-python. {error}") from None
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _restore_checkpoint(folder: Path) -> None:
    """Write the demo bundle's weights as a diffusers checkpoint. Raises LoadTestError."""
    if (folder / "model_index.json").exists():
        return
    command = [sys.executable, "-m", "engines.demo.restore", "--out", str(folder.resolve())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise LoadTestError(
            f"The demo checkpoint cannot be written ({lines[-1] if lines else ''}): install 'latentd[build]'."
        )


def _generate(client: httpx.Client, fields: dict[str, Any]) -> Pixels:
    reply = client.post("/generate", json=fields, headers={"Accept": "application/json"})
    if reply.status_code != 200:
        raise LoadTestError(f"{fields} was answered with {reply.status_code}: {reply.text[:300]}")
    return _pixels(base64.b64decode(reply.json()["images"][0]["image"]))


def _pixels(file: bytes) -> Pixels:
    return np.asarray(PIL.Image.open(io.BytesIO(file)).convert("RGB"), np.float64)


def _file_of(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def _writer(file: TextIO) -> Callable[[RequestRecord], None]:
    def write(sent: RequestRecord) -> None:
        file.write(sent.model_dump_json() + "\n")

    return write


def _no_progress(_at: float) -> None:
    """Progress is not shown."""


if __name__ == "__main__":
    sys.exit(main())
