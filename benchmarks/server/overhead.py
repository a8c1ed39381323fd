"""Measures what the server itself costs: requests per second and CPU time over engines that do nothing.

python -m benchmarks.server.overhead --out FILE                              the demo model, as it is
python -m benchmarks.server.overhead --out FILE --rows 16 --rows 64          with room for as many UNet rows in a step
python -m benchmarks.server.overhead --out FILE --size 512x512               pictures of another size

The server is a process of its own, and this one the only client. Both share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import uvloop
from prometheus_client.parser import text_string_to_metric_families
from pydantic import Field
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.inprocess import Served
from benchmarks.models import adapted
from benchmarks.server.null_engine import NullDevice, waves
from benchmarks.server.wire import Reply, ask, get, post
from engines.demo import BUNDLE as _DEMO
from engines.files import write_atomically
from engines.manifest import Manifest, Size
from loadtest.options import count, positive, size
from loadtest.provenance import ResultModel, Run, begin_run, now
from loadtest.statistics import Spread, percentile
from server.requests import images
from server.requests.intake import Intake
from server.requests.schemas import GenerateRequest
from server.requests.tokenizer import PromptTokenizer

READY = re.compile(r"is ready: open (http://\S+)")
_ANSWERS = {"PNG": "image/png", "JSON": "application/json"}
_BACKEND = "onnxruntime"
_OK = 200
_WIDTH = 120
_OFTEN = 300  # calls of which a part's time is the mean
Given = TypeVar("Given")


class NoServer(Exception):
    """The server did not start, or did not answer; the message says what it said."""


class Full(ResultModel):
    """A closed loop."""

    answer: str
    users: int
    seconds: float
    requests: int = Field(description="answered with 200 in those seconds")
    server_cpu: float = Field(description="seconds of processor time")
    client_cpu: float

    @property
    def rate(self) -> float:
        return self.requests / self.seconds

    @property
    def cost(self) -> float:
        """The server's CPU seconds per request."""
        return self.server_cpu / max(self.requests, 1)


class Parts(ResultModel):
    """CPU seconds of one request's pieces, each measured on its own and in this process."""

    validate_body: float = Field(description="JSON to a checked body")
    intake: float = Field(description="body to request: defaults, tokens, the scheduler's table")
    steps: float = Field(description="batching, plans, and the executor's loop; noise and the prompt's way in included")
    image: float = Field(description="pixels to PNG")


class Measured(ResultModel):
    """One server."""

    rows: int = Field(description="UNet rows that fit in a step")
    size: str
    steps: int
    full: tuple[Full, ...]
    single: dict[str, Spread] = Field(description="seconds of requests one after the other, by answer")
    parts: Parts


class Overhead(ResultModel):
    """The file's content."""

    run: Run
    servers: tuple[Measured, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for."""

    out: Path
    rows: tuple[int, ...]
    size: Size | None
    users: int
    steps: int
    seconds: float
    warm_up: float
    runs: int


class NullServer:
    """A server over engines that do nothing, in a process of its own. A context manager."""

    def __init__(self, bundle: Path) -> None:
        """Raises NoServer."""
        arguments = ["--bundle", str(bundle), "--port", "0", "--max-waiting", "10000"]
        command = [sys.executable, "-m", "benchmarks.server.null_engine", *arguments]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603 - our own
        said: list[str] = []
        for line in self._process.stderr or ():
            said.append(line)
            if found := READY.search(line):
                self.url = found[1]
                return
        self._process.wait()
        raise NoServer("".join(said))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.communicate()


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = _options(words)
    run = begin_run(["python", "-m", "benchmarks.server.overhead", *words])
    try:
        servers = tuple(_measure(options, rows) for rows in options.rows or (None,))
    except (NoServer, OSError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    found = Overhead(run=run.model_copy(update={"ended": now()}), servers=servers)
    write_atomically(options.out, found.model_dump_json(indent=1).encode())
    (Console() if sys.stdout.isatty() else Console(width=_WIDTH)).print(table(found))
    return 0


def _measure(options: Options, rows: int | None) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        bundle = _bundle(Path(folder), rows, options.size)
        manifest = Manifest.read(bundle)
        with NullServer(bundle) as server, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            client = _Client(server.url, options)
            full = tuple(runner.run(client.fill(answer)) for answer in _ANSWERS)
            single = {answer: runner.run(client.alone(answer)) for answer in _ANSWERS}
        return Measured(
            rows=manifest.max_rows,
            size=str(manifest.resolutions[0]),
            steps=options.steps,
            full=full,
            single=single,
            parts=_parts(bundle, manifest, options),
        )


def _bundle(folder: Path, rows: int | None, size: Size | None) -> Path:
    """The demo bundle, for other rows and another size in `folder`, which engines that do nothing do not mind."""
    facts: dict[str, Any] = {}
    if rows is not None:
        smaller = itertools.takewhile(lambda bucket: bucket < rows, (2**power for power in itertools.count(1)))
        facts["rows"] = (*smaller, rows)
    if size is not None:
        facts["resolutions"] = (size,)
    return adapted(_DEMO, folder, **facts)


class _Client:
    """Asks the server at `url`: each request has a prompt and a seed of its own."""

    def __init__(self, url: str, options: Options) -> None:
        self._url, self._options = url, options
        self._numbers = itertools.count()

    async def fill(self, answer: str) -> Full:
        """Let users ask again and again, and look at all that ends after the warm-up. Raises NoServer."""
        options, moments, refused = self._options, list[float](), list[Reply]()
        begin = time.perf_counter() + options.warm_up
        end = begin + options.seconds

        def hear(reply: Reply) -> None:
            moments.append(reply.at)
            if reply.status != _OK:
                refused.append(reply)

        asked = itertools.takewhile(lambda _: time.perf_counter() < end, self._requests(answer))
        asking = asyncio.create_task(ask(self._url, asked, hear, users=options.users))
        await asyncio.sleep(begin - time.perf_counter())
        before = await self._cpu()
        await asyncio.sleep(end - time.perf_counter())
        after = await self._cpu()
        await asking
        for reply in refused:
            _check(reply)
        return Full(
            answer=answer,
            users=options.users,
            seconds=after.at - before.at,
            requests=sum(before.at <= moment < after.at for moment in moments),
            server_cpu=after.server - before.server,
            client_cpu=after.client - before.client,
        )

    async def alone(self, answer: str) -> Spread:
        """The seconds of requests one after the other, without those that warm up. Raises NoServer."""
        replies: list[Reply] = []
        runs = self._options.runs
        await ask(self._url, itertools.islice(self._requests(answer), runs + runs // 10), replies.append, users=1)
        for reply in replies:
            _check(reply)
        return Spread(values=tuple(reply.seconds for reply in replies[-runs:]))

    async def _cpu(self) -> _Cpu:
        replies: list[Reply] = []
        await ask(self._url, iter([get(f"{self._url}/metrics")]), replies.append, users=1)
        samples = (one for family in text_string_to_metric_families(replies[0].body.decode()) for one in family.samples)
        spent = next(one.value for one in samples if one.name == "process_cpu_seconds_total")
        return _Cpu(replies[0].at, spent, time.process_time())

    def _requests(self, answer: str) -> Iterator[bytes]:
        for number in self._numbers:
            fields = _fields(number, self._options.steps)
            yield post(f"{self._url}/generate", fields, accept=_ANSWERS[answer])


@dataclass(frozen=True, slots=True)
class _Cpu:
    """Seconds of processor time so far."""

    at: float  # on perf_counter's clock
    server: float
    client: float


def _fields(number: int, steps: int) -> dict[str, str | int]:
    return {"prompt": f"a red heart and {number} stars", "seed": number, "num_inference_steps": steps}


def _check(reply: Reply) -> None:
    if reply.status != _OK:
        raise NoServer(f"The server answers {reply.status}: {reply.body[:500].decode(errors='replace')}")


def _parts(bundle: Path, manifest: Manifest, options: Options) -> Parts:
    size = manifest.resolutions[0]
    picture = waves(size.height, size.width)
    bodies = [GenerateRequest.model_validate(_fields(number, options.steps)) for number in range(_OFTEN)]
    written = [body.model_dump_json(exclude_defaults=True) for body in bodies]
    tokenizer = PromptTokenizer(
        bundle / manifest.tokenizer.file.path, tokens=manifest.context.tokens, pad=manifest.tokenizer.pad
    )
    intake = Intake(manifest, tokenizer)
    validate_body = _mean(GenerateRequest.model_validate_json, written)
    taken_in = _mean(intake.request, bodies)
    return Parts(
        validate_body=validate_body,
        intake=taken_in,
        steps=max(_stepping(bundle, manifest, options) - taken_in, 0),
        image=_mean(lambda _: images.encode(picture, "png"), bodies),
    )


def _mean(act: Callable[[Given], object], given: Sequence[Given]) -> float:
    began = time.thread_time()
    for one in given:
        act(one)
    return (time.thread_time() - began) / len(given)


def _stepping(bundle: Path, manifest: Manifest, options: Options) -> float:
    """CPU seconds of a request without HTTP."""
    with Served(bundle, _BACKEND, device=NullDevice) as served:
        began = time.process_time()
        full = served.saturate(manifest.max_rows, itertools.repeat(options.steps), seconds=options.seconds / 2)
        return (time.process_time() - began) / len(full.moments)


def table(found: Overhead) -> Table:
    """Every figure."""
    made = Table(title=f"What the server itself costs: {found.run.environment.processor}, {found.run.began[:10]}")
    for heading in ("server", "figure", "measured"):
        made.add_column(heading)
    for server in found.servers:
        made.add_section()
        name = f"{server.rows} rows, {server.size}"
        for figure, measured in _lines(server):
            made.add_row(name, figure, measured)
            name = ""
    return made


def _lines(server: Measured) -> Iterator[tuple[str, str]]:
    for full in server.full:
        share = full.client_cpu / full.seconds
        yield f"{full.answer}, {full.users} users", f"{full.rate:.0f} requests/s of {server.steps} steps"
        yield (
            "",
            f"{_ms(full.cost)} of CPU each; server {full.server_cpu / full.seconds:.0%}, client {share:.0%} of a core",
        )
    for answer, spread in server.single.items():
        p50, p99 = (percentile(spread.values, share) for share in (50, 99))
        yield f"{answer}, one after the other", f"p50 {_ms(p50)}, p99 {_ms(p99)}"
    parts = server.parts
    rest = server.full[0].cost - parts.validate_body - parts.intake - parts.steps - parts.image
    yield "CPU of a request: checking the body", _ms(parts.validate_body)
    yield "intake", _ms(parts.intake)
    yield "batching, plans, executor", f"{_ms(parts.steps)}, {_ms(parts.steps / server.steps)} a step"
    yield "PNG", _ms(parts.image)
    yield "HTTP, event loop, threads (the rest)", _ms(rest)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _options(words: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.server.overhead", description=(__doc__ or "").partition("\n")[0]
    )
    add, default = parser.add_argument, "default: %(default)s"
    add("--out", type=Path, required=True, metavar="FILE", help="where the raw values go")
    add(
        "--rows",
        type=count,
        action="append",
        default=[],
        help="UNet rows in a step (default: the demo bundle's)",
    )
    add("--size", type=size, metavar="WxH", help="of pictures (default: the demo bundle's)")
    add("--users", type=count, default=32, help=f"who each wait for their picture ({default})")
    add("--steps", type=count, default=20, help=f"of a request ({default})")
    add("--seconds", type=positive, default=10.0, help=f"of each closed loop that count ({default})")
    add("--warm-up", type=float, default=2.0, help=f"seconds before those ({default})")
    add("--runs", type=count, default=500, help=f"requests one after the other ({default})")
    given = parser.parse_args(words)
    return Options(**{**vars(given), "rows": tuple(given.rows)})


if __name__ == "__main__":
    sys.exit(main())
