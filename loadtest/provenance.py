"""Where measurements come from: the command, the commit, and the machine they were made on."""

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

from pydantic import BaseModel, ConfigDict, Field

from engines.backends.cuda import probe

_ROOT = Path(__file__).parent.parent
_INVOLVED = re.compile(
    r"(cuda|cudnn|nvidia|tensorrt|torch|triton|diffusers|transformers|onnx|openvino|numpy|tokenizers|latentd)"
)
_QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem"


class Fact(BaseModel):
    """Anything that is written to the JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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


def begin_run(command: list[str]) -> Run:
    """This call, and what it runs on."""
    return Run(command=shlex.join(command), began=now(), commit=_commit(), environment=_environment())


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


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
