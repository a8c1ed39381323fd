"""How much one caller is slowed by another who sends two hundred requests at once."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from pydantic import Field
from pydantic_settings import SettingsConfigDict
from rich.table import Table

from benchmarks.cli import complain, table_console
from benchmarks.faults.callers import Caller, Tally, ask_patiently
from benchmarks.faults.greedy import GreedyCaller
from benchmarks.process import ServerProcess, ServerStartError, free_port
from engines.cli import CommandLine, parse
from engines.files import write_atomically
from loadtest.charts import seconds
from loadtest.provenance import ResultModel, Run, begin_run, now
from server.access.keys import entry, new_key

_FIELDS = {"prompt": "a red heart on a yellow background", "num_inference_steps": 20, "seed": 1}
_SETTLE = 5.0  # seconds until the greedy caller's requests fill the queue


class FairnessResults(ResultModel):
    """The results file. Times in seconds."""

    run: Run
    alone: tuple[float, ...] = Field(description="the polite caller's requests without others, in order")
    contended: tuple[float, ...] = Field(description="its requests while the greedy caller asks")
    full_step: float = Field(description="mean time of a step that the greedy caller's requests take alone")
    greedy: dict[str, int] = Field(description="how the greedy caller's requests ended")

    @property
    def bound(self) -> float:
        """Twice the time alone, and the step that is under way when the polite request arrives."""
        return 2 * _p95(self.alone) + self.full_step

    @property
    def holds(self) -> bool:
        return _p95(self.contended) <= self.bound


class FairnessCommand(CommandLine):
    """Measure how much a polite caller is slowed by a greedy one.

    python -m benchmarks.server.fairness --out fairness.json

    The polite caller sends one request after the other, first alone, then while another key has two hundred open.
    The exit code is 1 if its 95th percentile is more than twice that alone plus one full step. Run it on a machine with
    nothing else to do.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m benchmarks.server.fairness")

    out: Path = Field(description="JSON file to write the results to")
    requests: int = Field(60, ge=1, description="requests of the polite caller, in each of the two parts")
    connections: int = Field(200, ge=1, description="connections of the greedy caller")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(FairnessCommand, words)
    run = begin_run(["python", "-m", "benchmarks.server.fairness", *words])
    port = free_port()
    polite, greedy, admin = (new_key() for _ in range(3))
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "keys.toml"
            names = {"polite": polite, "greedy": greedy, "admin": admin}
            file.write_text("\n".join(entry(name, key, admin=name == "admin") for name, key in names.items()))
            command = [sys.executable, "-m", "server", "--port", str(port), "--api-keys", str(file)]
            with ServerProcess(command, port=port) as server:
                found = _measure(Server(server.url, polite, greedy, admin), options, run)
    except (ServerStartError, OSError, httpx.HTTPError) as error:
        complain(error)
        return 2
    write_atomically(options.out, found.model_dump_json(indent=1).encode())
    table_console(120).print(_table(found))
    return int(not found.holds)


@dataclass(frozen=True, slots=True)
class Server:
    """A server, and its callers' keys."""

    url: str
    polite: str
    greedy: str
    admin: str


def _measure(server: Server, options: FairnessCommand, run: Run) -> FairnessResults:
    _ask(server, 3)  # what only requests load is there before anything is measured
    alone = _ask(server, options.requests)
    with GreedyCaller(server.url, key=server.greedy, connections=options.connections, fields=_FIELDS) as greedy:
        time.sleep(_SETTLE)
        before = _steps(server)
        time.sleep(_SETTLE)
        count, total = (after - begin for after, begin in zip(_steps(server), before, strict=True))
        contended = _ask(server, options.requests)
    return FairnessResults(
        run=run.model_copy(update={"ended": now()}),
        alone=alone,
        contended=contended,
        full_step=total / count,
        greedy=dict(greedy.endings),
    )


def _ask(server: Server, count: int) -> tuple[float, ...]:
    """Seconds until each image, one request after the other."""
    caller = Caller(server.url, Tally(), key=server.polite)

    async def ask() -> tuple[float, ...]:
        times = []
        for _ in range(count):
            began = time.perf_counter()
            answer = await ask_patiently(caller, _FIELDS, tries=50)
            if answer.ending != "completed":
                raise OSError(f"a request of the polite caller ended as {answer.ending}: {answer.body[:200]!r}")
            times.append(time.perf_counter() - began)
        return tuple(times)

    return asyncio.run(ask())


def _steps(server: Server) -> tuple[float, float]:
    """How many steps have been taken, and their seconds in all."""
    answer = httpx.get(f"{server.url}/metrics", headers={"X-API-Key": server.admin}).raise_for_status()
    families = text_string_to_metric_families(answer.text)
    samples = {sample.name: sample.value for family in families for sample in family.samples}
    return samples["latentd_step_duration_seconds_count"], samples["latentd_step_duration_seconds_sum"]


def _p95(times: Sequence[float]) -> float:
    return float(np.percentile(times, 95))


def _table(found: FairnessResults) -> Table:
    table = Table("polite caller", "median", "p95", "most")
    for name, times in (("alone", found.alone), ("with the greedy caller", found.contended)):
        table.add_row(name, *(seconds(value) for value in (float(np.median(times)), _p95(times), max(times))))
    verdict = "holds" if found.holds else "does not hold"
    table.caption = (
        f"bound: 2 x alone + one full step of {seconds(found.full_step)} = {seconds(found.bound)}: {verdict}"
    )
    return table


if __name__ == "__main__":
    sys.exit(main())
