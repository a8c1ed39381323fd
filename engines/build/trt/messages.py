"""What the parent and the process that builds an engine send each other, as JSON: one job, then a line per message."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import get_args

from engines.build.trt.layers import LayerCounts

Shape = tuple[int, ...]
Ranges = Mapping[str, tuple[Shape, Shape, Shape]]  # by input: smallest, optimal, largest


@dataclass(frozen=True, slots=True)
class BuildJob:
    """The build of one engine. Paths are strings, as in JSON."""

    module: str  # "tensorrt" or "tensorrt_rtx"
    onnx: str
    out: str
    temporary: str  # where the engine is written before it replaces `out`
    profiles: Sequence[Ranges]
    optimization_level: int | None = None  # 0..5; None for TensorRT for RTX, which has no levels
    timing_cache: str | None = None  # the file that keeps the timings of kernels from build to build

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class PhaseStarted:
    """TensorRT began a phase. Phases nest."""

    name: str
    steps: int


@dataclass(frozen=True, slots=True)
class PhaseAdvanced:
    """A phase has done so many of its steps."""

    name: str
    done: int


@dataclass(frozen=True, slots=True)
class PhaseFinished:
    name: str


@dataclass(frozen=True, slots=True)
class MemoryUsed:
    """The peak of main memory so far, in bytes. Sent regularly, which also shows whether the parent still listens."""

    peak: int


@dataclass(frozen=True, slots=True)
class BuildWarning:
    """A warning of TensorRT."""

    text: str


@dataclass(frozen=True, slots=True)
class BuildFailure:
    """The last message of a build that failed."""

    kind: str  # name of a class in `engines.build.trt.errors`
    text: str


@dataclass(frozen=True, slots=True)
class EngineReport:
    """The last message of a build that succeeded. What neither TensorRT's log nor the loaded engine shows is None."""

    layers: LayerCounts | None
    seconds: float  # of compiling
    memory: int  # bytes of main memory at the peak; 0 if the system does not say
    activations: Sequence[int] | None  # bytes of device memory by profile
    reused_timings: int | None = None  # timings of kernels that earlier builds left; None without a timing cache


Message = PhaseStarted | PhaseAdvanced | PhaseFinished | MemoryUsed | BuildWarning | BuildFailure | EngineReport
_KINDS: Mapping[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}


def encode(message: Message) -> str:
    """`message` as a line."""
    return json.dumps({"type": type(message).__name__, **asdict(message)}) + "\n"


def decode(line: str) -> Message:
    """The message that `encode` wrote."""
    fields = json.loads(line)
    return _KINDS[fields.pop("type")](**fields)
