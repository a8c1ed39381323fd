"""Runs stages while time is left, and saves each result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape

from benchmarks.gpu.figures import Figures
from benchmarks.gpu.options import GpuBenchCommand
from benchmarks.gpu.results_file import ResultsFile, Stage, StageResult
from engines.errors import EngineError

_log = logging.getLogger(__name__)


class Budget:
    """The time that a run may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(self._end - time.monotonic(), 0.0)

    def fits(self, seconds: float) -> bool:
        return seconds <= self.left


class GpuBench:
    """Runs the stages that are due while time is left, and saves each result."""

    def __init__(self, options: GpuBenchCommand, results: ResultsFile, console: Console) -> None:
        self.options = options
        self.budget = Budget(options.budget)
        self.results = results
        self._console = console

    def due(self, stage: Stage, model: str = "", engine: str = "") -> bool:
        found = self.results.record.find(stage, model, engine)
        kept = not self.options.only and found is not None and found.complete
        return self.options.wants(stage) and not kept

    def measure(
        self, stage: Stage, model: str, engine: str, make: Callable[[], Figures], *, needs: float | None = None
    ) -> bool:
        """Save what `make` measures, or why it failed. Returns whether it succeeded."""
        name = " ".join(filter(None, (stage, model, engine)))
        needed = self.options.needs(stage) if needs is None else needs
        if not self.budget.fits(needed):
            self._put(stage, model, engine, note=f"it needs about {needed:.0f} s, {self.budget.left:.0f} s were left")
            return False
        self._console.print(f"{name} …", style="dim")
        began = time.monotonic()
        try:
            figures = make()
        except Exception as error:  # whatever a library raises, the other stages can still run
            if not isinstance(error, EngineError):
                _log.error("%s failed", name, exc_info=error)
            self._put(stage, model, engine, note=first_line(error), seconds=time.monotonic() - began)
            return False
        self._put(stage, model, engine, figures=figures, seconds=time.monotonic() - began)
        return True

    def fail(self, stages: Sequence[Stage], model: str, engine: str, note: str) -> None:
        for stage in stages:
            self._put(stage, model, engine, note=note)

    def _put(
        self,
        stage: Stage,
        model: str,
        engine: str,
        *,
        figures: Figures | None = None,
        note: str = "",
        seconds: float = 0.0,
    ) -> None:
        run = len(self.results.record.runs) - 1
        result = StageResult(
            stage=stage, model=model, engine=engine, run=run, seconds=round(seconds, 2), figures=figures, note=note
        )
        self.results.put(result)
        if note:
            self._console.print(f"{stage} {model} {engine}: not measured: {escape(note)}", style="yellow")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or else its type."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
