"""The results file of the GPU benchmark: one for each device and day, to which every call adds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import BaseModel, Field

from benchmarks.gpu.figures import Figures, Rows
from engines.files import write_atomically
from loadtest.provenance import ResultModel, Run, now

Stage = Literal[
    "peak", "torch", "batch", "build", "rows", "single", "serve", "decode", "lora", "compile", "compile_batch"
]


STAGES: tuple[Stage, ...] = get_args(Stage)
PYTORCH = "PyTorch"


def pytorch_at(rows: int) -> str:
    """What stands as the engine of PyTorch's results at a number of rows: each is a stage of its own."""
    return f"{PYTORCH} at {rows} rows"


class StageResult(ResultModel):
    """What a stage measured of a model and an engine, or why it measured nothing."""

    stage: Stage
    model: str = Field(description="empty if the stage has none")
    engine: str = Field(description="a backend, or empty")
    run: int = Field(description="index of the run")
    seconds: float = Field(description="duration of the stage")
    figures: Figures | None = None
    note: str = ""

    @property
    def complete(self) -> bool:
        """Whether nothing was left to a later call."""
        return self.figures is not None and not (isinstance(self.figures, Rows) and self.figures.left_out)

    @property
    def key(self) -> tuple[Stage, str, str]:
        return self.stage, self.model, self.engine


class GpuResults(BaseModel):
    """The file's content."""

    format: Literal[1] = 1
    device: str
    runs: list[Run] = []
    results: list[StageResult] = []

    def find(self, stage: Stage, model: str = "", engine: str = "") -> StageResult | None:
        return next((result for result in self.results if result.key == (stage, model, engine)), None)


class ResultsFile:
    """The results and their file, which is saved after every stage."""

    def __init__(self, path: Path, record: GpuResults) -> None:
        self.path = path
        self.record = record

    @classmethod
    def open(cls, folder: Path, run: Run) -> Self:
        """Begin a run in the file of its device and day. Raises ValueError for a file of another kind."""
        device = run.environment.device
        path = folder / f"{slug(device)}-{run.began[:10]}.json"
        record = GpuResults.model_validate_json(path.read_bytes()) if path.exists() else GpuResults(device=device)
        record.runs.append(run)
        return cls(path, record)

    def put(self, result: StageResult) -> None:
        """Replace an earlier result of the same stage, unless only the earlier one has figures."""
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
    """`name` as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def trace_name(model: str, engine: str) -> str:
    """The file with what the executor and the device did in the rows stage, in the folder of the results."""
    return f"trace-{slug(model)}-{slug(engine)}.json"
