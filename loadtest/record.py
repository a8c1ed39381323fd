"""The raw JSON of a machine's measurements: one file for a device and a day, added to by every call."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, Field

from engines.cuda import probe
from engines.manifest import write_atomically
from loadtest.figures import Fact, Figures

Stage = Literal["peak", "torch", "build", "rows", "single", "serve", "decode", "compile"]
STAGES: tuple[Stage, ...] = ("peak", "torch", "build", "rows", "single", "serve", "decode", "compile")

_ROOT = Path(__file__).parent.parent
_INVOLVED = re.compile(
    r"(cuda|cudnn|nvidia|tensorrt|torch|triton|diffusers|transformers|onnx|openvino|numpy|tokenizers|latentd)"
)
_QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem"


class Environment(Fact):
    """What it was measured on."""

    device: str
    compute_capability: str | None
    gpu: dict[str, str] = Field(description="what nvidia-smi says; empty where there is none")
    cuda: str | None = Field(description="the newest that the driver knows")
    processor: str
    cores: int
    system: str
    python: str
    packages: dict[str, str]


class Run(Fact):
    """One call of the benchmark."""

    command: str
    began: str
    ended: str | None = None
    commit: str | None = Field(default=None, description="of this repository, + where files differ from it")
    environment: Environment


class Result(Fact):
    """What a stage found of a model and an engine, or why it found nothing."""

    stage: Stage
    model: str = Field(description="empty where it is not about one")
    engine: str = Field(description="a backend, or empty")
    run: int = Field(description="which of the runs")
    seconds: float = Field(description="that the stage took")
    figures: Figures | None = None
    note: str = ""

    @property
    def key(self) -> tuple[Stage, str, str]:
        return self.stage, self.model, self.engine


class Record(BaseModel):
    """The file's content."""

    format: Literal[1] = 1
    device: str
    runs: list[Run] = []
    results: list[Result] = []

    def find(self, stage: Stage, model: str = "", engine: str = "") -> Result | None:
        return next((result for result in self.results if result.key == (stage, model, engine)), None)


class Book:
    """A record and its file, which holds every result as soon as it is there."""

    def __init__(self, path: Path, record: Record) -> None:
        self.path = path
        self.record = record

    @classmethod
    def open(cls, folder: Path, run: Run) -> Self:
        """Begin a run in the file of its device and day. Raises ValueError for a file that is none of ours."""
        device = run.environment.device
        path = folder / f"{slug(device)}-{run.began[:10]}.json"
        record = Record.model_validate_json(path.read_bytes()) if path.exists() else Record(device=device)
        record.runs.append(run)
        return cls(path, record)

    def put(self, result: Result) -> None:
        """Keep `result` in place of the one before it, unless it found nothing and that did."""
        before = self.record.find(*result.key)
        if before is None:
            self.record.results.append(result)
        elif result.figures or not before.figures:
            self.record.results[self.record.results.index(before)] = result
        self.save()

    def close(self) -> None:
        self.record.runs[-1] = self.record.runs[-1].model_copy(update={"ended": now()})
        self.save()

    def save(self) -> None:
        write_atomically(self.path, self.record.model_dump_json(indent=1).encode())


def begin_run(command: list[str]) -> Run:
    """This call, and what it runs on."""
    return Run(command=shlex.join(command), began=now(), commit=_commit(), environment=_environment())


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def slug(name: str) -> str:
    """A part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _environment() -> Environment:
    gpu, processor = probe().gpu, _processor()
    named = {dist.name: dist.version for dist in distributions() if _INVOLVED.search(dist.name.lower())}
    return Environment(
        device=gpu.name if gpu else processor,
        compute_capability=gpu.compute_capability if gpu else None,
        gpu=_gpu(),
        cuda=_cuda(),
        processor=processor,
        cores=len(os.sched_getaffinity(0)),
        system=platform.platform(),
        python=sys.version.split()[0],
        packages=dict(sorted(named.items())),
    )


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _gpu() -> dict[str, str]:
    values = _output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader")
    first = values.splitlines()[0].split(", ") if values else []
    return dict(zip(_QUERY.split(","), first, strict=False))


def _cuda() -> str | None:
    found = re.search(r"CUDA Version: ([\d.]+)", _output("nvidia-smi") or "")
    return found[1] if found else None


def _commit() -> str | None:
    head = _output("git", "-C", str(_ROOT), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{head}{'+' if changed else ''}" if head else None


def _output(program: str, *arguments: str) -> str | None:
    """What it prints; None where it is not here, or does not do it."""
    path = shutil.which(program)
    if path is None:
        return None
    done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=30, check=False)  # noqa: S603 - ours
    return done.stdout.strip() if done.returncode == 0 else None
