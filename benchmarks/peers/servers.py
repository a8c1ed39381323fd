"""Compares servers under load: ours, and two that people build of diffusers; the same weights, callers and client.

python -m benchmarks.peers.servers --out DIR --peers-python VENV/bin/python     all of them
python -m benchmarks.peers.servers --out DIR --only fastapi onnxruntime         some of them
python -m benchmarks.peers.servers --out DIR --resume --only openvino           one more, or one anew

They serve the demo model, one after the other, each alone on the machine. Callers come as often as they do because of
what the FastAPI server, the yardstick, takes for a request when idle; good is an answer within four times that.

It writes DIR/serving.json, DIR/serving.md and DIR/serving.svg, and a line for each request to DIR/requests-….jsonl.
It exits with 1 where servers draw different pictures, and with 2 where nothing could be measured.
"""

from __future__ import annotations

import argparse
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
from typing import Any, TextIO

import httpx
import numpy as np
import PIL.Image
from numpy.typing import NDArray
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from benchmarks.peers.server_process import ROOT, Running, free_port
from benchmarks.peers.servers_report import picture, table
from benchmarks.peers.servers_results import (
    SCENARIOS,
    SLO,
    YARDSTICK,
    Record,
    Result,
    Scenario,
    Settings,
    Under,
    entries,
)
from engines.accuracy import psnr
from engines.backends.available import unavailable_reason
from engines.files import write_atomically
from loadtest.client import LoadTestError, ServerClient
from loadtest.generator import LoadGenerator, measure_idle_latencies
from loadtest.options import count, positive
from loadtest.provenance import begin_run, now
from loadtest.results import LoadLevel, RequestRecord

_PACKAGES = ("torch", "diffusers", "transformers", "fastapi", "uvicorn", "litserve")
_ALIKE = 35.0  # dB: pictures that differ more are not of the same request
_WAIT = 60.0  # seconds beyond what the yardstick would take for all callers, before the client hangs up
_SEED = 7  # of the pictures that are compared
_CONSOLE_WIDTH = 160
_VERSIONS = (
    "import json, sys\nfrom importlib import metadata\nfound = {}\nfor name in sys.argv[1:]:\n"
    "    try:\n        found[name] = metadata.version(name)\n"
    "    except metadata.PackageNotFoundError:\n        pass\nprint(json.dumps(found))"
)
Pixels = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Server:
    """One that is compared. `needs` are packages of the peers' interpreter; ours has a backend in place of them."""

    name: str
    title: str
    needs: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        return not self.needs


_DIFFUSERS = ("torch", "diffusers", "transformers")
SERVERS = (
    Server("fastapi", "FastAPI, diffusers and a lock", (*_DIFFUSERS, "fastapi", "uvicorn")),
    Server("litserve", "LitServe, diffusers, batches of requests", (*_DIFFUSERS, "litserve")),
    Server("onnxruntime", "latentd, ONNX Runtime"),
    Server("openvino", "latentd, OpenVINO"),
)
_TITLES = tuple((server.name, server.title) for server in SERVERS)


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for."""

    out: Path
    only: tuple[str, ...]
    peers_python: str
    scenarios: tuple[Scenario, ...]
    resume: bool
    settings: Settings


@dataclass(slots=True)
class Bench:
    """A comparison while it goes on."""

    options: Options
    record: Record
    console: Console
    pictures: dict[tuple[Scenario, int], Pixels] = field(default_factory=dict)  # the yardstick's

    def measure(self, server: Server) -> Result:
        """Start `server`, put every load on it, and stop it; a note where that cannot be."""
        run = len(self.record.runs) - 1
        if reason := self._missing(server):
            return Result(server=server.name, run=run, note=reason)
        self.console.print(f"{server.title} …", style="dim", highlight=False)
        port = free_port()
        log = self.options.out / f"{server.name}.log"
        try:
            with Running(self._command(server, port), port=port, log=log) as running:
                alike = self._compare(server, running.url)
                loads = asyncio.run(self._put_loads(server, running.url))
                took = {"ready_after": running.ready_after, "memory": running.memory or None}
                return Result(server=server.name, run=run, psnr=alike, loads=loads, **took)
        except (LoadTestError, httpx.HTTPError) as error:
            return Result(server=server.name, run=run, note=str(error) or type(error).__name__)

    def save(self) -> None:
        out = self.options.out
        write_atomically(out / "serving.json", self.record.model_dump_json(indent=1).encode())
        write_atomically(out / "serving.md", table(self.record, _TITLES).encode())
        write_atomically(out / "serving.svg", picture(self.record, _TITLES).encode())

    def _missing(self, server: Server) -> str:
        """Why it cannot be measured here, and what to do; empty if it can."""
        if lacking := [name for name in server.needs if name not in self.record.peers]:
            return f"not installed: {self.options.peers_python} -m pip install {' '.join(lacking)}"
        if server.name != YARDSTICK and any(self.record.idle(scenario) is None for scenario in self.options.scenarios):
            return f"its loads follow from {YARDSTICK}, which was not measured: add that to --only, or give --resume."
        return (unavailable_reason(server.name) or "") if server.ours else ""

    def _command(self, server: Server, port: int) -> list[str]:
        shared = ["--port", str(port), "--threads", str(self.options.settings.threads)]
        if server.ours:
            return [sys.executable, "-m", "server", "--backend", server.name, "--log-level", "warning", *shared]
        module, checkpoint = f"loadtest.peer_server_{server.name}", (self.options.out / "checkpoint").resolve()
        return [self.options.peers_python, "-m", module, "--checkpoint", str(checkpoint), *shared]

    def _compare(self, server: Server, url: str) -> float | None:
        """Draw a picture of each entry: the yardstick's are kept, and the least PSNR beside them is told."""
        found: list[float] = []
        with httpx.Client(base_url=url, timeout=_WAIT, trust_env=False) as client:
            for scenario in self.options.scenarios:
                for number, entry in enumerate(self.record.scenarios[scenario]):
                    pixels = _draw(client, {**entry.fields, "seed": _SEED})
                    if server.name == YARDSTICK:
                        self.pictures[scenario, number] = pixels
                        write_atomically(self._picture(scenario, number), _file_of(pixels))
                    else:
                        found.append(psnr(pixels, self._yardstick(scenario, number)))
        return min(found, default=None)

    def _yardstick(self, scenario: Scenario, number: int) -> Pixels:
        if (scenario, number) not in self.pictures:
            self.pictures[scenario, number] = _pixels(self._picture(scenario, number).read_bytes())
        return self.pictures[scenario, number]

    def _picture(self, scenario: Scenario, number: int) -> Path:
        return self.options.out / f"yardstick-{scenario}-{number}.png"

    async def _put_loads(self, server: Server, url: str) -> tuple[Under, ...]:
        loads: list[Under] = []
        with (self.options.out / f"requests-{server.name}.jsonl").open("w", encoding="utf-8") as file:
            for scenario in self.options.scenarios:
                loads.append(await self._put(scenario, url, file))
        return tuple(loads)

    async def _put(self, scenario: Scenario, url: str, file: TextIO) -> Under:
        """Every rate of a scenario. Requests are numbered with their load, on through the scenarios."""
        settings, mix = self.options.settings, self.record.mix(scenario)
        first = self.options.scenarios.index(scenario) * len(settings.rates)
        async with ServerClient(
            url, timeout=_WAIT + max(settings.rates) * (settings.warm_up + settings.seconds)
        ) as node:
            alone = await measure_idle_latencies(node, mix)
            idle = self.record.idle(scenario) or mix.mean(alone)  # it is the yardstick that has nothing to go by
            accepted = (SLO * idle,) * len(mix.entries)
            driver = LoadGenerator(node, mix, idle_latencies=alone, latency_targets=accepted, on_request=_writer(file))
            points = []
            for number, share in enumerate(settings.rates, first):
                load = LoadLevel(rate=share / idle, warm_up=settings.warm_up, seconds=settings.seconds)
                points.append((await driver.run(load, number, _silent)).point)
        return Under(scenario=scenario, alone=alone, points=tuple(points))


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = _options(words)
    console = Console() if sys.stdout.isatty() else Console(width=_CONSOLE_WIDTH)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        bench = Bench(options, _record(options), console)
        bench.record.runs.append(begin_run(["python", "-m", "benchmarks.peers.servers", *words]))
        due = [server for server in SERVERS if _is_due(server, options, bench.record)]
        if any(not server.ours for server in due):
            _restore_checkpoint(options.out / "checkpoint")
        for server in due:
            if server.name == YARDSTICK:
                bench.record.results = []  # by another yardstick
            bench.record.put(result := bench.measure(server))
            bench.save()
            if result.note:
                console.print(f"{server.name}: not measured: {escape(result.note)}", style="yellow", soft_wrap=True)
    except (LoadTestError, OSError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    bench.record.runs[-1] = bench.record.runs[-1].model_copy(update={"ended": now()})
    bench.save()
    console.print(table(bench.record, _TITLES), markup=False, highlight=False, soft_wrap=True)
    return judge(bench.record, console)


def judge(record: Record, console: Console) -> int:
    """The exit code."""
    if not any(result.loads for result in record.results):
        return 2
    others = [result for result in record.results if result.psnr is not None and result.psnr < _ALIKE]
    for result in others:
        console.print(f"{result.server} draws other pictures: {result.psnr:.1f} dB", style="bold red")
    return int(bool(others))


def _is_due(server: Server, options: Options, record: Record) -> bool:
    """Whether it is to be measured: again, if it is named or was not measured before."""
    if options.only:
        return server.name in options.only
    found = record.find(server.name)
    return found is None or not found.loads


def _record(options: Options) -> Record:
    """The one to begin, or to go on with. Raises LoadTestError."""
    path = options.out / "serving.json"
    peers = _versions(options.peers_python)
    scenarios = {scenario: entries(scenario, options.settings.steps) for scenario in options.scenarios}
    begun = Record(settings=options.settings, scenarios=scenarios, peers=peers)
    if not (options.resume and path.exists()):
        return begun
    try:
        kept = Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise LoadTestError(f"{path} is none of ours: choose another --out, or leave out --resume. {error}") from None
    if (kept.settings, kept.scenarios) != (begun.settings, begun.scenarios):
        raise LoadTestError(f"{path} was measured with other options: choose another --out, or leave out --resume.")
    kept.peers = peers
    return kept


def _versions(python: str) -> dict[str, str]:
    """What the peers' interpreter has of what they need. Raises LoadTestError where it does not run."""
    try:
        done = subprocess.run(  # noqa: S603 - the interpreter that was named
            [python, "-c", _VERSIONS, *_PACKAGES], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise LoadTestError(f"{python} does not run: give the interpreter with --peers-python. {error}") from None
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _restore_checkpoint(folder: Path) -> None:
    """The demo bundle's weights as diffusers reads them. Raises LoadTestError."""
    if (folder / "model_index.json").exists():
        return
    command = [sys.executable, "-m", "engines.demo.restore", "--out", str(folder.resolve())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise LoadTestError(
            f"The demo checkpoint cannot be written ({lines[-1] if lines else ''}): it takes 'latentd[build]'."
        )


def _draw(client: httpx.Client, fields: dict[str, Any]) -> Pixels:
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
    def hear(sent: RequestRecord) -> None:
        file.write(sent.model_dump_json() + "\n")

    return hear


def _silent(_at: float) -> None:
    """Nobody watches a load go by."""


def _options(words: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.servers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, default = parser.add_argument, "default: %(default)s"
    names = [server.name for server in SERVERS]
    add("--out", type=Path, required=True, metavar="DIR", help="where results go")
    add("--only", nargs="+", choices=names, default=[], help="servers to measure, also where --resume found them")
    add("--peers-python", default=sys.executable, metavar="PATH", help="interpreter that has the peers' packages")
    add("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="what is asked (default: both)")
    shares = "callers, as shares of what the yardstick draws one after the other"
    add("--rate", nargs="+", type=positive, default=[0.5, 1.0, 2.0], metavar="R", help=f"{shares}; {default}")
    add("--duration", type=positive, default=40.0, metavar="S", help=f"seconds of each rate that count; {default}")
    add("--warm-up", type=positive, default=3.0, metavar="S", help=f"seconds before them; {default}")
    add(
        "--steps",
        type=count,
        default=20,
        metavar="N",
        help=f"of a request; a mix has half and half more; {default}",
    )
    add("--threads", type=count, default=len(os.sched_getaffinity(0)), metavar="N", help=f"of each server; {default}")
    add("--seed", type=int, default=0, help=f"of the callers; {default}")
    add("--resume", action="store_true", help="keep what DIR holds, and measure what is missing there")
    given = parser.parse_args(words)
    settings = Settings(
        rates=tuple(sorted(set(given.rate))),
        seconds=given.duration,
        warm_up=given.warm_up,
        steps=given.steps,
        threads=given.threads,
        seed=given.seed,
    )
    scenarios = tuple(scenario for scenario in SCENARIOS if scenario in given.scenario)
    return Options(given.out, tuple(given.only), given.peers_python, scenarios, given.resume, settings)


if __name__ == "__main__":
    sys.exit(main())
