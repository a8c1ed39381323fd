"""The raw JSON of a machine's measurements: one file for a device and a day, added to by every call."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, Field

from benchmarks.gpu.figures import Figures
from engines.files import write_atomically
from loadtest.provenance import ResultModel, Run, now

Stage = Literal["peak", "torch", "build", "rows", "single", "serve", "decode", "compile"]


STAGES: tuple[Stage, ...] = ("peak", "torch", "build", "rows", "single", "serve", "decode", "compile")


class Result(ResultModel):
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


def slug(name: str) -> str:
    """A part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
