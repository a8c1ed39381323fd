"""Shows where a server's memory goes: engine by engine as they are loaded, in the order in which the server does.

python -m benchmarks.server.memory --out memory.json                                   the demo model
python -m benchmarks.server.memory --out memory.json --bundle bundles/mine --backend openvino

The executor runs in this process, without HTTP. Linux only, whose accounts it reads.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from numpy.typing import DTypeLike
from pydantic import Field
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.inprocess import Served
from engines.backends.available import engine_path, precision_of
from engines.backends.device import Buffer, Device, Engine, Stream
from engines.backends.registry import ON_CPU, open_device
from engines.contract import GRAPHS, GraphName
from engines.demo import BUNDLE as _DEMO
from engines.errors import EngineError
from engines.files import write_atomically
from engines.manifest import Manifest
from loadtest.options import count
from loadtest.provenance import ResultModel, Run, begin_run, now

_PROCESS = Path("/proc/self")
_FORGET_PEAK = "5"  # what clear_refs takes for it
_KILO, _MEBI = 2**10, 2**20


class Moment(ResultModel):
    """What the process held when something was done, bytes."""

    done: str
    files: int = Field(description="of the engine that was loaded, on disk")
    own: int = Field(description="memory that nobody else has: RssAnon")
    mapped: int = Field(description="pages of files, which the system can take back: RssFile")
    peak: int = Field(description="the most of both together, since the moment before: VmHWM")


class Memory(ResultModel):
    """The file's content."""

    run: Run
    bundle: str
    backend: str
    precision: str
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> int:
        return max(moment.peak for moment in self.moments)


class Diary:
    """Writes down moment after moment."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []

    def note(self, done: str, files: int = 0) -> None:
        """Something is done, with so many bytes of files. Raises OSError where the system keeps no such account."""
        text = (_PROCESS / "status").read_text(encoding="ascii")
        found = {name: int(size) * _KILO for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
        self.moments.append(
            Moment(done=done, files=files, own=found["RssAnon"], mapped=found["RssFile"], peak=found["VmHWM"])
        )
        (_PROCESS / "clear_refs").write_text(_FORGET_PEAK, encoding="ascii")


class _Watched:
    """A device, and a diary of what it loads."""

    def __init__(self, device: Device, diary: Diary, engines: Mapping[Path, tuple[str, int]]) -> None:
        self.name, self.pads = device.name, device.pads
        self._device, self._diary, self._engines = device, diary, engines

    def stream(self, name: str, *, urgent: bool = False) -> Stream:
        return self._device.stream(name, urgent=urgent)

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike, *, purpose: str = "other") -> Buffer:
        return self._device.allocate(shape, dtype, purpose=purpose)

    def load(self, path: Path, stream: Stream) -> Engine:
        loaded = self._device.load(path, stream)
        self._diary.note(*self._engines[path])
        return loaded

    def end_warm_up(self) -> None:
        self._device.end_warm_up()

    def memory(self) -> Mapping[str, int]:
        return self._device.memory()


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    given = _options(words)
    run = begin_run(["python", "-m", "benchmarks.server.memory", *words])
    try:
        manifest = Manifest.load(given.bundle)
        moments = _moments(manifest, given.bundle, given.backend, threads=given.threads, steps=given.steps)
    except (EngineError, OSError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    found = Memory(
        run=run.model_copy(update={"ended": now()}),
        bundle=manifest.name,
        backend=given.backend,
        precision=precision_of(manifest, given.backend),
        moments=moments,
    )
    write_atomically(given.out, found.model_dump_json(indent=1).encode())
    Console().print(table(found))
    return 0


def _moments(manifest: Manifest, bundle: Path, backend: str, *, threads: int, steps: int) -> tuple[Moment, ...]:
    """Raises EngineError."""
    diary = Diary()
    engines = {
        bundle / engine_path(manifest, backend, name): (name, _on_disk(manifest, backend, name)) for name in GRAPHS
    }

    def device() -> Device:
        opened = open_device(backend, threads=threads)
        diary.note("the interpreter and its packages")
        return _Watched(opened, diary, engines)

    with Served(bundle, backend, device=device) as served:
        diary.note("buffers, and a rehearsal of each size")
        served.draw(steps)
        diary.note(f"a picture of {manifest.resolutions[0]}")
    return tuple(diary.moments)


def _on_disk(manifest: Manifest, backend: str, graph: GraphName) -> int:
    build = manifest.builds.get(backend)
    files = build.engines[graph].files if build else manifest.graphs[graph].onnx["fp32"].files
    return sum(file.size for file in files)


def table(found: Memory) -> Table:
    """Moment after moment, in MiB."""
    title = f"{found.bundle} in {found.precision}, {found.backend}: {found.peak / _MEBI:,.0f} MiB at the peak"
    made = Table(title=title)
    made.add_column("done")
    for heading in ("on disk", "own", "mapped", "together", "peak"):
        made.add_column(heading, justify="right")
    for moment in found.moments:
        sizes = (moment.own, moment.mapped, moment.own + moment.mapped, moment.peak)
        on_disk = f"{moment.files / _MEBI:,.0f}" if moment.files else ""
        made.add_row(moment.done, on_disk, *(f"{size / _MEBI:,.0f}" for size in sizes))
    return made


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.server.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="where the raw values go")
    add("--bundle", type=Path, default=_DEMO, metavar="DIR", help="default: the demo model")
    add("--backend", choices=ON_CPU, default="onnxruntime", help="default: %(default)s")
    add("--threads", type=count, default=0, help="of the backend (default: one per core)")
    add("--steps", type=count, default=4, help="of the picture (default: %(default)s)")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
