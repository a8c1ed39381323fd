"""The display of a build: progress as bars on a terminal, as lines in a log, or as JSON for a program."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from engines.build.outline import Outline
from engines.progress import Stage

_NARROW = 90  # columns, below which bars are short, so that the names of stages fit


class BarDisplay:
    """Progress on a terminal: a bar per stage in progress, and one for the whole build. A context manager.

    Stages that have ended become lines above the bars, which vanish at the end: what is printed last stays last.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(overflow="fold")),
            BarColumn(bar_width=10 if console.width < _NARROW else 40),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._outline = Outline(clock)
        self._whole: TaskID | None = None
        self._clock = clock
        self._stages: list[_NestedStage] = []  # from the outermost to the innermost

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def expect(self, stages: Sequence[str]) -> None:
        self._outline.expect(stages)
        if self._whole is None:
            self._whole = self._bars.add_task("in all", total=1)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        began, task = self._clock(), self._bars.add_task("  " * len(self._stages) + escape(name), total=None)
        begun = _NestedStage(name, lambda: self._on_update(task, begun))
        self._stages.append(begun)
        if len(self._stages) == 1:
            self._outline.begin(name)
            self._show_whole()
        try:
            yield begun
            begun.ended = True
        finally:
            self._stages.pop()
            self._bars.remove_task(task)
            if self._stages:
                self._stages[-1].end_nested(begun)
            else:
                self._end(begun, self._clock() - began)

    def note(self, text: str) -> None:
        self._bars.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _on_update(self, task: TaskID, begun: _NestedStage) -> None:
        self._bars.update(task, completed=begun.done, total=begun.total)
        self._show_whole()

    def _show_whole(self) -> None:
        if self._whole is not None:
            fraction = self._outline.fraction(_fraction(self._stages))
            left = self._outline.time_left(fraction)
            self._bars.update(self._whole, completed=fraction, description=f"in all{left and f', {left}'}")

    def _end(self, stage: _NestedStage, seconds: float) -> None:
        self._outline.end()
        self._bars.refresh()
        mark = "[green]✓[/]" if stage.ended else "[red]✗[/]"
        self._bars.console.print(
            f"{mark} {escape(stage.name)} [dim]{seconds:.1f} s[/]", highlight=False, soft_wrap=True
        )


class LogDisplay:
    """Progress as plain lines: one when an outermost stage begins, one when it ends. A context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._outline = Outline(time.monotonic)
        self._depth = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: a log holds no resources."""

    def expect(self, stages: Sequence[str]) -> None:
        self._outline.expect(stages)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        began = time.monotonic()
        if self._depth == 0:
            self._outline.begin(name)
            self.note(" ".join((*self._outline.position(), name, "...")))
        self._depth += 1
        try:
            yield self
        finally:
            self._depth -= 1
        if self._depth == 0:
            self._outline.end()
            self.note(f"{name}: {time.monotonic() - began:.1f} s")

    def update(self, done: float, total: float) -> None:
        """Do nothing: a log has no bars."""

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


class JsonDisplay:
    """Progress for another program: JSON lines with the percentage of the outermost stage. A context manager.

    `{"stage": "compiling denoise for tensorrt", "percent": 40}`, with null until the stage reports its length, and
    `{"note": "denoise of tensorrt: unchanged"}`.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._stages: list[_NestedStage] = []  # from the outermost to the innermost
        self._percent: int | None = None  # of the outermost stage, as last written

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: the file is the caller's."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        self._stages.append(_NestedStage(name, self._on_update))
        if len(self._stages) == 1:
            self._write_percent(None)
        try:
            yield self._stages[-1]
        finally:
            ended = self._stages.pop()
            if self._stages:
                self._stages[-1].end_nested(ended)

    def expect(self, stages: Sequence[str]) -> None:
        """Do nothing: the other program knows what it started."""

    def note(self, text: str) -> None:
        self._write({"note": text})

    def _on_update(self) -> None:
        percent = int(100 * _fraction(self._stages))
        if self._percent is None or percent > self._percent:  # a nested stage may begin again, which would lower it
            self._write_percent(percent)

    def _write_percent(self, percent: int | None) -> None:
        self._percent = percent
        self._write({"stage": self._stages[0].name, "percent": percent})

    def _write(self, message: Mapping[str, object]) -> None:
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()


@dataclass(slots=True)
class _NestedStage:
    """A stage of which `done` of `total` units are finished, and the fraction `within` of the unit in progress.

    The number of stages that are nested in a unit is unknown, so each counts for half of what is left of the unit.
    """

    name: str
    on_update: Callable[[], None]
    done: float = 0
    total: float = 0  # 0: not yet known
    within: float = 0
    ended: bool = False  # without an error

    def update(self, done: float, total: float) -> None:
        if done != self.done:
            self.within = 0
        self.done, self.total = done, total
        self.on_update()

    def end_nested(self, nested: _NestedStage) -> None:
        if nested.total:
            self.within = self.within_at(1)

    def within_at(self, nested: float) -> float:
        """The finished fraction of the unit in progress, when the fraction `nested` of a nested stage is finished."""
        return self.within + (1 - self.within) / 2 * nested


def _fraction(stages: Sequence[_NestedStage]) -> float:
    """The finished fraction of the outermost of `stages`, each of them nested in the one before."""
    nested = 0.0
    for stage in reversed(stages):
        if stage.total:
            nested = min((stage.done + stage.within_at(nested)) / stage.total, 1.0)
    return nested


Display = BarDisplay | LogDisplay | JsonDisplay


def terminal() -> Console:
    """A console on standard error, wide enough for the tables if it is not a terminal."""
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, width=140)


def display_on(console: Console) -> BarDisplay | LogDisplay:
    """Bars if the console is a terminal, lines if it is a log."""
    return BarDisplay(console) if console.is_terminal else LogDisplay(console)
