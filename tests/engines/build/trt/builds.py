"""Running builds in tests: progress that is recorded, processes that are watched, a module in TensorRT's place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engines.build.trt.messages import EngineReport

RTX = "tensorrt_rtx"


@dataclass
class Stage:
    name: str
    updates: list[tuple[float, float]] = field(default_factory=list)
    ended: bool = False

    def update(self, done: float, total: float) -> None:
        self.updates.append((done, total))


class Recorder:
    """Progress that records every stage, fails unless they nest, and calls `act` when one begins."""

    def __init__(self, act: Callable[[str], object] = lambda name: name) -> None:
        self.stages: list[Stage] = []
        self.notes: list[str] = []
        self._act = act
        self._open: list[Stage] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        stage = Stage(name)
        self.stages.append(stage)
        self._open.append(stage)
        try:
            self._act(name)
            yield stage
        finally:
            assert self._open.pop() is stage
            stage.ended = True

    def expect(self, stages: Sequence[str]) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass
class Built:
    report: EngineReport
    progress: Recorder
    out: Path


def alive(process: int) -> bool:
    """Whether a process runs. A zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def soon(condition: Callable[[], bool], seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, module: str, code: str) -> None:
    """Replace a TensorRT module by `code`."""
    (folder / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)


PRETENDED = """
import time

class ComputeCapability: pass
class IProgressMonitor: pass
class ILogger:
    class Severity(int):
        ERROR, WARNING = 1, 2
class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 1
class Builder:
    def __init__(self, logger):
        logger.log(ILogger.Severity(2), "ready")
"""
