"""Measures the overhead of the server: requests per second and CPU time over engines that do nothing."""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from prometheus_client.parser import text_string_to_metric_families
from pydantic import Field, PositiveInt
from pydantic_settings import SettingsConfigDict
from rich.table import Table

from benchmarks.cli import ImageSize, Seconds, complain, size_of, table_console
from benchmarks.inprocess import Served
from benchmarks.models import adapted
from benchmarks.process import ServerProcess, ServerStartError, server_command
from benchmarks.server.null_engine import NullDevice, waves
from benchmarks.server.wire import WireReply, get, post, send_all
from engines.cli import CommandLine, RepeatableList, parse
from engines.demo import BUNDLE as _DEMO
from engines.files import write_atomically
from engines.manifest import Manifest, Size
from loadtest.analysis.statistics import Spread, percentile
from loadtest.provenance import ResultModel, Run, begin_run, now
from server.requests import images
from server.requests.intake import Intake
from server.requests.schemas import GenerateRequest
from server.requests.tokenizer import PromptTokenizer

_FORMATS = {"PNG": "image/png", "JSON": "application/json"}
_BACKEND = "onnxruntime"
_OK = 200
_WIDTH = 120
_CALLS = 300  # of each part of a request: its time is their mean
ArgumentT = TypeVar("ArgumentT")


class RequestFailedError(Exception):
    """The server answered with an error; the message holds its status and body."""


class ClosedLoop(ResultModel):
    """Users who each send the next request as soon as the last is answered."""

    answer: str = Field(description="format of the responses: PNG or JSON")
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


class RequestCosts(ResultModel):
    """CPU seconds of the parts of one request, each measured alone and in this process."""

    validate_body: float = Field(description="from JSON to a validated body")
    intake: float = Field(description="from body to request: defaults, tokens, the scheduler's table")
    steps: float = Field(
        description="batching, plans and the executor's loop, with noise and the encoding of the prompt"
    )
    image: float = Field(description="pixels to PNG")


class ServerOverhead(ResultModel):
    """One server's results."""

    rows: int = Field(description="UNet rows that fit in a step")
    size: str
    steps: int
    full: tuple[ClosedLoop, ...]
    single: dict[str, Spread] = Field(description="seconds of requests one after the other, by response format")
    parts: RequestCosts


class Overhead(ResultModel):
    """The results file."""

    run: Run
    servers: tuple[ServerOverhead, ...]


class OverheadCommand(CommandLine):
    """Measure what the server itself costs: requests per second and CPU time over engines that do nothing.

    python -m benchmarks.server.overhead --out FILE                         the demo model as it is
    python -m benchmarks.server.overhead --out FILE --rows 16 --rows 64     steps of up to 16, then 64 UNet rows
    python -m benchmarks.server.overhead --out FILE --size 512x512          images of another size

    The server runs in a process of its own, and this process is the only client. Both share the machine's cores.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m benchmarks.server.overhead")

    out: Path = Field(description="JSON file to write the results to")
    rows: RepeatableList[PositiveInt] = Field(
        (), description="UNet rows in a step, repeatable; unless given, the demo bundle's"
    )
    size: ImageSize | None = Field(None, description="WIDTHxHEIGHT of the images; unless given, the demo bundle's")
    users: PositiveInt = Field(32, description="concurrent users, each with one request in flight")
    steps: PositiveInt = Field(20, description="denoising steps of a request")
    seconds: Seconds = Field(10.0, description="seconds measured in each closed loop")
    warm_up: float = Field(2.0, ge=0, description="seconds before those, which are not counted")
    runs: PositiveInt = Field(500, description="requests sent one after the other, for latency")


def null_server(bundle: Path) -> ServerProcess:
    """Our server over engines that do nothing, not yet started. Waiting requests are never refused."""
    arguments = ("--bundle", str(bundle), "--max-waiting", "10000")
    return ServerProcess(server_command(*arguments, module="benchmarks.server.null_engine"))


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(OverheadCommand, words)
    run = begin_run(["python", "-m", "benchmarks.server.overhead", *words])
    try:
        servers = tuple(_measure(options, rows) for rows in options.rows or (None,))
    except (ServerStartError, RequestFailedError, OSError) as error:
        complain(error)
        return 2
    found = Overhead(run=run.model_copy(update={"ended": now()}), servers=servers)
    write_atomically(options.out, found.model_dump_json(indent=1).encode())
    table_console(_WIDTH).print(table(found))
    return 0


def _measure(options: OverheadCommand, rows: int | None) -> ServerOverhead:
    with tempfile.TemporaryDirectory() as folder:
        bundle = _bundle(Path(folder), rows, size_of(options.size) if options.size else None)
        manifest = Manifest.read(bundle)
        with null_server(bundle) as server, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            client = _Client(server.url, options)
            full = tuple(runner.run(client.fill(format_)) for format_ in _FORMATS)
            single = {format_: runner.run(client.one_by_one(format_)) for format_ in _FORMATS}
        return ServerOverhead(
            rows=manifest.max_rows,
            size=str(manifest.resolutions[0]),
            steps=options.steps,
            full=full,
            single=single,
            parts=_parts(bundle, manifest, options),
        )


def _bundle(folder: Path, rows: int | None, size: Size | None) -> Path:
    """The demo bundle in `folder` with other rows and sizes, which engines that do nothing take as well."""
    fields: dict[str, Any] = {}
    if rows is not None:
        smaller = itertools.takewhile(lambda bucket: bucket < rows, (2**power for power in itertools.count(1)))
        fields["rows"] = (*smaller, rows)
    if size is not None:
        fields["resolutions"] = (size,)
    return adapted(_DEMO, folder, **fields)


class _Client:
    """Sends requests to the server at `url`, each with a prompt and a seed of its own."""

    def __init__(self, url: str, options: OverheadCommand) -> None:
        self._url, self._options = url, options
        self._numbers = itertools.count()

    async def fill(self, format_: str) -> ClosedLoop:
        """Keep `users` requests in flight, and count those answered after the warm-up. Raises RequestFailedError."""
        options, moments, failed = self._options, list[float](), list[WireReply]()
        begin = time.perf_counter() + options.warm_up
        end = begin + options.seconds

        def on_reply(reply: WireReply) -> None:
            moments.append(reply.at)
            if reply.status != _OK:
                failed.append(reply)

        requests = itertools.takewhile(lambda _: time.perf_counter() < end, self._requests(format_))
        sending = asyncio.create_task(send_all(self._url, requests, on_reply, users=options.users))
        await asyncio.sleep(begin - time.perf_counter())
        before = await self._cpu()
        await asyncio.sleep(end - time.perf_counter())
        after = await self._cpu()
        await sending
        for reply in failed:
            _check(reply)
        return ClosedLoop(
            answer=format_,
            users=options.users,
            seconds=after.at - before.at,
            requests=sum(before.at <= moment < after.at for moment in moments),
            server_cpu=after.server - before.server,
            client_cpu=after.client - before.client,
        )

    async def one_by_one(self, format_: str) -> Spread:
        """Latency in seconds of requests sent one after the other, after a warm-up. Raises RequestFailedError."""
        replies: list[WireReply] = []
        runs = self._options.runs
        await send_all(self._url, itertools.islice(self._requests(format_), runs + runs // 10), replies.append, users=1)
        for reply in replies:
            _check(reply)
        return Spread(values=tuple(reply.seconds for reply in replies[-runs:]))

    async def _cpu(self) -> _Cpu:
        replies: list[WireReply] = []
        await send_all(self._url, iter([get(f"{self._url}/metrics")]), replies.append, users=1)
        samples = (one for family in text_string_to_metric_families(replies[0].body.decode()) for one in family.samples)
        spent = next(one.value for one in samples if one.name == "process_cpu_seconds_total")
        return _Cpu(replies[0].at, spent, time.process_time())

    def _requests(self, format_: str) -> Iterator[bytes]:
        for number in self._numbers:
            fields = _fields(number, self._options.steps)
            yield post(f"{self._url}/generate", fields, accept=_FORMATS[format_])


@dataclass(frozen=True, slots=True)
class _Cpu:
    """Seconds of processor time so far."""

    at: float  # on perf_counter's clock
    server: float
    client: float


def _fields(number: int, steps: int) -> dict[str, str | int]:
    return {"prompt": f"a red heart and {number} stars", "seed": number, "num_inference_steps": steps}


def _check(reply: WireReply) -> None:
    if reply.status != _OK:
        raise RequestFailedError(f"The server answers {reply.status}: {reply.body[:500].decode(errors='replace')}")


def _parts(bundle: Path, manifest: Manifest, options: OverheadCommand) -> RequestCosts:
    size = manifest.resolutions[0]
    image = waves(size.height, size.width)
    bodies = [GenerateRequest.model_validate(_fields(number, options.steps)) for number in range(_CALLS)]
    written = [body.model_dump_json(exclude_defaults=True) for body in bodies]
    tokenizer = PromptTokenizer(
        bundle / manifest.tokenizer.file.path, tokens=manifest.context.tokens, pad=manifest.tokenizer.pad
    )
    intake = Intake(manifest, tokenizer)
    validate_body = _mean_seconds(GenerateRequest.model_validate_json, written)
    intake_seconds = _mean_seconds(intake.request, bodies)
    return RequestCosts(
        validate_body=validate_body,
        intake=intake_seconds,
        steps=max(_executor_seconds(bundle, manifest, options) - intake_seconds, 0),
        image=_mean_seconds(lambda _: images.encode(image, "png"), bodies),
    )


def _mean_seconds(call: Callable[[ArgumentT], object], arguments: Sequence[ArgumentT]) -> float:
    began = time.thread_time()
    for argument in arguments:
        call(argument)
    return (time.thread_time() - began) / len(arguments)


def _executor_seconds(bundle: Path, manifest: Manifest, options: OverheadCommand) -> float:
    """CPU seconds of a request that does not come over HTTP."""
    with Served(bundle, _BACKEND, device=NullDevice) as served:
        began = time.process_time()
        full = served.saturate(manifest.max_rows, itertools.repeat(options.steps), seconds=options.seconds / 2)
        return (time.process_time() - began) / len(full.moments)


def table(found: Overhead) -> Table:
    """All results, for people."""
    result = Table(title=f"Server overhead: {found.run.environment.processor}, {found.run.began[:10]}")
    for heading in ("server", "measurement", "result"):
        result.add_column(heading)
    for server in found.servers:
        result.add_section()
        name = f"{server.rows} rows, {server.size}"
        for measurement, text in _lines(server):
            result.add_row(name, measurement, text)
            name = ""
    return result


def _lines(server: ServerOverhead) -> Iterator[tuple[str, str]]:
    for full in server.full:
        share = full.client_cpu / full.seconds
        yield f"{full.answer}, {full.users} concurrent users", f"{full.rate:.0f} requests/s of {server.steps} steps"
        busy = f"server {full.server_cpu / full.seconds:.0%}, client {share:.0%} of a core"
        yield "", f"{_ms(full.cost)} of server CPU per request; {busy}"
    for answer, spread in server.single.items():
        p50, p99 = (percentile(spread.values, share) for share in (50, 99))
        yield f"{answer}, one request at a time", f"latency p50 {_ms(p50)}, p99 {_ms(p99)}"
    parts = server.parts
    rest = server.full[0].cost - parts.validate_body - parts.intake - parts.steps - parts.image
    yield "CPU per request: validating the body", _ms(parts.validate_body)
    yield "intake", _ms(parts.intake)
    yield "batching, plans, executor", f"{_ms(parts.steps)}, {_ms(parts.steps / server.steps)} per step"
    yield "PNG encoding", _ms(parts.image)
    yield "HTTP, event loop, threads (the remainder)", _ms(rest)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


if __name__ == "__main__":
    sys.exit(main())
