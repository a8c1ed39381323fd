"""Shows where a server's memory goes: engine by engine, in the order in which the server loads them."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from numpy.typing import DTypeLike
from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic_settings import SettingsConfigDict
from rich.console import Console
from rich.table import Table

from benchmarks.cli import complain
from benchmarks.inprocess import Served
from engines.backends.available import engine_path, precision_of
from engines.backends.device import Buffer, Device, Engine, Reader, Stream
from engines.backends.registry import ON_CPU, open_device
from engines.cli import CommandLine, parse
from engines.contract import GRAPHS, GraphName
from engines.demo import BUNDLE as _DEMO
from engines.errors import EngineError
from engines.files import write_atomically
from engines.manifest import Manifest
from loadtest.provenance import ResultModel, Run, begin_run, now

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"  # written to clear_refs
_KILO, _MEBI = 2**10, 2**20


class MemorySample(ResultModel):
    """Memory of the process after a stage, bytes."""

    done: str = Field(description="the stage")
    files: int = Field(description="of the engine that was loaded in this stage, on disk")
    own: int = Field(description="private memory: RssAnon")
    mapped: int = Field(description="pages of files, which the system can reclaim: RssFile")
    peak: int = Field(description="the most of both together since the sample before: VmHWM")


class MemoryReport(ResultModel):
    """The results file."""

    run: Run
    bundle: str
    backend: str
    precision: str
    moments: tuple[MemorySample, ...]

    @property
    def peak(self) -> int:
        return max(moment.peak for moment in self.moments)


class MemoryLog:
    """Samples of this process' memory. psutil has no peak on Linux, so they are read from /proc."""

    def __init__(self) -> None:
        self.samples: list[MemorySample] = []

    def add(self, done: str, files: int = 0) -> None:
        """Take a sample after a stage that loaded so many bytes of files. Raises OSError where there is no /proc."""
        text = (_PROCESS / "status").read_text(encoding="ascii")
        found = {name: int(size) * _KILO for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
        self.samples.append(
            MemorySample(done=done, files=files, own=found["RssAnon"], mapped=found["RssFile"], peak=found["VmHWM"])
        )
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK, encoding="ascii")


class _LoggedDevice:
    """A device that adds a sample to a log after each engine it loads."""

    def __init__(self, device: Device, log: MemoryLog, engines: Mapping[Path, tuple[str, int]]) -> None:
        self.name, self.pads = device.name, device.pads
        self._device, self._log, self._engines = device, log, engines

    def stream(self, name: str, *, urgent: bool = False) -> Stream:
        return self._device.stream(name, urgent=urgent)

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike, *, purpose: str = "other") -> Buffer:
        return self._device.allocate(shape, dtype, purpose=purpose)

    def load(self, path: Path, stream: Stream, *, read: Reader = Path.read_bytes) -> Engine:
        loaded = self._device.load(path, stream, read=read)
        self._log.add(*self._engines[path])
        return loaded

    def end_warm_up(self) -> None:
        self._device.end_warm_up()

    def memory(self) -> Mapping[str, int]:
        return self._device.memory()

    def uncaptured(self) -> Mapping[str, int]:
        return self._device.uncaptured()


class MemoryCommand(CommandLine):
    """Show where a server's memory goes: engine by engine, in the order in which the server loads them.

    python -m benchmarks.server.memory --out memory.json                               the demo model
    python -m benchmarks.server.memory --out memory.json --bundle bundles/mine --backend openvino

    The executor runs in this process, without HTTP. Linux only: it reads /proc.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m benchmarks.server.memory")

    out: Path = Field(description="JSON file to write the results to")
    bundle: Path = Field(_DEMO, description="folder of the model; the demo model unless given")
    backend: str = Field(
        "onnxruntime", pattern=f"^({'|'.join(ON_CPU)})$", description=f"what runs the graphs: {' or '.join(ON_CPU)}"
    )
    threads: NonNegativeInt = Field(0, description="CPU threads of the backend; 0 takes one per core")
    steps: PositiveInt = Field(4, description="denoising steps of the image")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(MemoryCommand, words)
    run = begin_run(["python", "-m", "benchmarks.server.memory", *words])
    try:
        manifest = Manifest.load(options.bundle)
        moments = _moments(manifest, options.bundle, options.backend, threads=options.threads, steps=options.steps)
    except (EngineError, OSError) as error:
        complain(error)
        return 2
    found = MemoryReport(
        run=run.model_copy(update={"ended": now()}),
        bundle=manifest.name,
        backend=options.backend,
        precision=precision_of(manifest, options.backend),
        moments=moments,
    )
    write_atomically(options.out, found.model_dump_json(indent=1).encode())
    Console().print(table(found))
    return 0


def _moments(manifest: Manifest, bundle: Path, backend: str, *, threads: int, steps: int) -> tuple[MemorySample, ...]:
    """Raises EngineError."""
    log = MemoryLog()
    engines = {
        bundle / engine_path(manifest, backend, name): (name, _on_disk(manifest, backend, name)) for name in GRAPHS
    }

    def device() -> Device:
        opened = open_device(backend, threads=threads)
        log.add("interpreter and packages")
        return _LoggedDevice(opened, log, engines)

    with Served(bundle, backend, device=device) as served:
        log.add("buffers and warm-up of each size")
        served.draw(steps)
        log.add(f"an image of {manifest.resolutions[0]}")
    return tuple(log.samples)


def _on_disk(manifest: Manifest, backend: str, graph: GraphName) -> int:
    build = manifest.builds.get(backend)
    files = build.engines[graph].files if build else manifest.graphs[graph].onnx["fp32"].files
    return sum(file.size for file in files)


def table(found: MemoryReport) -> Table:
    """Sample after sample, in MiB."""
    title = f"{found.bundle} in {found.precision}, {found.backend}: {found.peak / _MEBI:,.0f} MiB at the peak"
    made = Table(title=title)
    made.add_column("after")
    for heading in ("files, MiB", "private, MiB", "mapped, MiB", "together, MiB", "peak, MiB"):
        made.add_column(heading, justify="right")
    for moment in found.moments:
        sizes = (moment.own, moment.mapped, moment.own + moment.mapped, moment.peak)
        on_disk = f"{moment.files / _MEBI:,.0f}" if moment.files else ""
        made.add_row(moment.done, on_disk, *(f"{size / _MEBI:,.0f}" for size in sizes))
    return made


if __name__ == "__main__":
    sys.exit(main())
