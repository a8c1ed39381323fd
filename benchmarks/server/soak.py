"""Thousands of requests of all kinds from callers who come and go: what the server holds must stay as it was."""

from __future__ import annotations

import asyncio
import hashlib
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt
from pydantic_settings import SettingsConfigDict
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.cli import complain
from benchmarks.faults.attackers import noisy_picture
from benchmarks.faults.callers import EVENTS, JSON, Caller, Tally
from benchmarks.faults.ledger import Ledger, Resources, settle
from benchmarks.faults.probe import Prober
from benchmarks.process import ServerProcess, ServerStartError, server_command
from engines.cli import CommandLine, parse
from engines.files import write_atomically
from loadtest.charts import seconds
from loadtest.provenance import ResultModel, Run, begin_run, now

_MEBI = 2**20
_SETTLE = 60.0  # seconds
_GROWTH = 48 * _MEBI  # bytes between a server that has seen every kind of request and the end
_WARM_UP = 0.1  # of the requests come before the first sample counts
_SCHEDULERS = ("euler", "euler_a", "ddim", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_3m_sde", "unipc", "heun")
_FIXED = {"prompt": "a red heart on a yellow background", "num_inference_steps": 4, "seed": 7}


class SoakSample(ResultModel):
    """What the server's process held after some requests, with nothing in flight."""

    requests: int
    memory: int = Field(description="proportional set size, bytes")
    descriptors: int
    threads: int
    in_flight: int


class SoakResults(ResultModel):
    """The results file."""

    run: Run | None = None
    callers: int
    answers: dict[str, int]
    outcomes: dict[str, int] = Field(description="accepted requests by outcome, from /metrics")
    samples: tuple[SoakSample, ...]
    same_bytes: bool = Field(description="a fixed seed gave the same picture at the start and at the end")
    slowest_live: float = Field(description="seconds, of /v2/health/live from a process of its own")
    faults: tuple[str, ...] = Field(description="what the ledger or the samples have against the server")


class SoakCommand(CommandLine):
    """Send thousands of requests of all kinds from callers who come and go, and show what the server holds.

    python -m benchmarks.server.soak --out soak.json

    The server has the demo model and one thread. The exit code is 1 if the ledger does not balance, or memory,
    descriptors, threads or a fixed seed's picture are not as they were.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m benchmarks.server.soak")

    out: Path = Field(description="JSON file to write the results to")
    requests: PositiveInt = Field(3000, description="requests in all")
    callers: PositiveInt = Field(32, description="callers at a time")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(SoakCommand, words)
    run = begin_run(["python", "-m", "benchmarks.server.soak", *words])
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("soaking", total=options.requests)
            found = soak(
                options.requests, options.callers, on_progress=lambda done: progress.update(task, completed=done)
            )
    except (ServerStartError, OSError) as error:
        complain(error)
        return 2
    found = found.model_copy(update={"run": run.model_copy(update={"ended": now()})})
    write_atomically(options.out, found.model_dump_json(indent=1).encode())
    _print(Console(), found)
    return int(bool(found.faults))


def soak(requests: int, callers: int, *, on_progress: Callable[[int], object] = lambda _: None) -> SoakResults:
    """Start a server and send the requests. Raises ServerStartError."""
    with ServerProcess(server_command("--threads", "1")) as server:
        return asyncio.run(_Soak(server.url, server.pid, callers).run(requests, on_progress))


class _Soak:
    """Rounds of requests, each followed by a sample."""

    def __init__(self, url: str, pid: int, callers: int) -> None:
        self._url, self._pid, self._callers = url, pid, callers
        self._tally = Tally()
        self._caller = Caller(url, self._tally)
        self._dice = random.Random(0)  # noqa: S311 - dice
        self._picture = noisy_picture(64 * 1024)

    async def run(self, requests: int, on_progress: Callable[[int], object]) -> SoakResults:
        rounds = [int(requests * share) for share in (_WARM_UP, *(0.25, 0.4, 0.55, 0.7, 0.85, 1.0))]
        first = await self._fixed()
        samples: list[SoakSample] = []
        ledger = Ledger()
        with Prober(self._url) as prober:
            for until in rounds:
                await self._round(until)
                on_progress(until)
                ledger, held = settle(self._url, self._pid, _held(samples), seconds=_SETTLE)
                samples.append(_sample(self._tally.sent, ledger, held))
        same = await self._fixed() == first
        return SoakResults(
            callers=self._callers,
            answers=dict(self._tally.endings),
            outcomes=dict(ledger.outcomes),
            samples=tuple(samples),
            same_bytes=same,
            slowest_live=prober.probes.slowest,
            faults=tuple(self._faults(ledger, samples, same, len(prober.probes.failures))),
        )

    def _faults(self, ledger: Ledger, samples: Sequence[SoakSample], same: bool, unanswered: int) -> list[str]:
        sent = Tally(self._tally.sent - 1, self._tally.answers[:-1])  # the last came after the ledger was read
        growth = _resources(samples[-1]).growth(_resources(samples[0]), memory=_GROWTH)
        found = [*ledger.faults(sent), *growth]
        if not same:
            found.append("a fixed seed gave another picture at the end")
        if unanswered:
            found.append(f"{unanswered} probes of /live were not answered")
        if broken := [answer.status for answer in self._tally.answers if answer.ending in ("failed", "invalid")]:
            found.append(f"{len(broken)} requests failed: {sorted(set(broken))}")
        return found

    async def _fixed(self) -> str:
        answer = await self._caller.ask(_FIXED, accept="image/png")
        return hashlib.sha256(answer.body).hexdigest()

    async def _round(self, until: int) -> None:
        """Send requests until so many were sent in all, from callers of whom each is followed by another."""

        async def one_after_the_other() -> None:
            while self._tally.sent < until:
                await self._caller.ask(self._fields(), accept=self._pick(JSON, EVENTS), leave_after=self._patience())

        async with asyncio.TaskGroup() as group:
            for _ in range(self._callers):
                group.create_task(one_after_the_other())

    def _fields(self) -> dict[str, Any]:
        """A request of any kind: schedulers, steps, guidance, images, previews, image-to-image."""
        fields: dict[str, Any] = {
            "prompt": self._pick("a red heart", "a penguin on ice", f"an owl, number {self._dice.randrange(10**6)}"),
            "num_inference_steps": self._dice.randint(2, 6),
            "scheduler": self._pick(*_SCHEDULERS),
            "guidance_scale": self._pick(1.0, 4.0),
            "num_images": self._pick(1, 1, 1, 2),
            "seed": self._dice.randrange(2**31),
        }
        if self._dice.random() < 0.2:
            fields |= {"image": self._picture, "strength": 0.5}
        return fields

    def _patience(self) -> float | None:
        """Seconds after which the caller leaves: one in four leaves at some moment."""
        return self._dice.uniform(0.0, 1.0) if self._dice.random() < 0.25 else None

    def _pick(self, *choices: Any) -> Any:
        return self._dice.choice(choices)


def _sample(requests: int, ledger: Ledger, held: Resources) -> SoakSample:
    return SoakSample(
        requests=requests,
        memory=held.memory,
        descriptors=held.descriptors,
        threads=held.threads,
        in_flight=ledger.in_flight,
    )


def _resources(sample: SoakSample) -> Resources:
    return Resources(sample.memory, sample.descriptors, sample.threads)


def _held(samples: Sequence[SoakSample]) -> Resources:
    return _resources(samples[0]) if samples else Resources(0, 10**6, 0)


def _print(console: Console, found: SoakResults) -> None:
    table = Table("requests so far", "memory (PSS), MiB", "descriptors", "threads", "in flight")
    for one in found.samples:
        memory = f"{one.memory / _MEBI:.0f}"
        table.add_row(str(one.requests), memory, str(one.descriptors), str(one.threads), str(one.in_flight))
    console.print(table)
    console.print("callers saw: " + ", ".join(f"{count} {name}" for name, count in sorted(found.answers.items())))
    console.print("the server: " + ", ".join(f"{count} {name}" for name, count in sorted(found.outcomes.items())))
    console.print(
        f"slowest /live: {seconds(found.slowest_live)}; fixed seed: {'same' if found.same_bytes else 'other'} bytes"
    )
    for fault in found.faults:
        console.print(f"[red]{fault}[/]", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
