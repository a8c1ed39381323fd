"""The provenance of measurements: the command, the commit, and the machine."""

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
_RECORDED = re.compile(
    r"(cuda|cudnn|nvidia|tensorrt|torch|triton|diffusers|transformers|onnx|openvino|numpy|tokenizers|latentd)"
)
_QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem"


class ResultModel(BaseModel):
    """Base of the models that results files consist of."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Environment(ResultModel):
    """The machine and the packages of a measurement."""

    device: str
    compute_capability: str | None
    gpu: dict[str, str] = Field(description="nvidia-smi's fields; empty without a GPU")
    cuda: str | None = Field(description="the newest CUDA version that the driver supports")
    processor: str
    cores: int
    system: str
    python: str
    packages: dict[str, str]


class Run(ResultModel):
    """One run of a measuring command, with its provenance."""

    command: str
    began: str
    ended: str | None = None
    commit: str | None = Field(default=None, description="commit of this repository, with a + if files differ")
    environment: Environment


def begin_run(command: list[str]) -> Run:
    """Return the provenance of a run of `command` that begins now."""
    return Run(command=shlex.join(command), began=now(), commit=_commit(), environment=_environment())


def now() -> str:
    """Return the time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _environment() -> Environment:
    gpu, processor = probe().gpu, _processor()
    named = {dist.name: dist.version for dist in distributions() if _RECORDED.search(dist.name.lower())}
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
    """Return what the program prints; None where it is missing or fails."""
    path = shutil.which(program)
    if path is None:
        return None
    done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=30, check=False)  # noqa: S603 - ours
    return done.stdout.strip() if done.returncode == 0 else None
