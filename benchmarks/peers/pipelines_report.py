"""What a comparison with other pipelines found, as it is kept and as it is told. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, Field

from loadtest.provenance import ResultModel, Run

EAGER, FULL_EAGER = "torch-eager", "torch-eager-sd14"
_HEADINGS = (
    "contestant",
    "s per image",
    "× eager, small-SD",
    "× eager, SD 1.4",
    "start-up, s",
    "peak memory, GiB",
    "of eager's memory",
    "PSNR, dB",
)
_NOTHING = "–"


class Settings(ResultModel):
    """What every contestant was asked. Results are kept as long as it stays the same."""

    sizes: dict[str, int] = Field(description="steps, by size")
    repeats: int = Field(description="pictures of each turn, after one of one step that warms up")
    rounds: int = Field(description="turns of each contestant, at each size")
    guidance: float
    threads: int
    prompts: tuple[str, ...] = Field(description="picture k has prompt k, in turns, and seed k")


class Turn(ResultModel):
    """What a contestant did in one life of its process, or why it did nothing."""

    contestant: str
    size: str
    round: int
    run: int = Field(description="which of the runs")
    startup: float | None = Field(default=None, description="seconds from the start of the process to being ready")
    warm_up: float | None = Field(default=None, description="seconds of the first picture, of one step")
    seconds: tuple[float, ...] = Field(default=(), description="of each picture")
    errors: tuple[float, ...] = Field(
        default=(), description="mean squared difference from torch-eager's picture, of colours 0 to 255"
    )
    peak_bytes: int = 0
    note: str = Field(default="", description="why there is nothing")

    @property
    def key(self) -> tuple[str, str, int]:
        return self.contestant, self.size, self.round


class Record(BaseModel):
    """The file's content."""

    format: Literal[1] = 1
    settings: Settings
    runs: list[Run] = []
    peers_packages: dict[str, str] = Field(default={}, description="of --peers-python")
    apart: dict[str, float] = Field(
        default={}, description="by size: mean squared difference of torch-eager's first two pictures"
    )
    turns: list[Turn] = []

    def find(self, key: tuple[str, str, int]) -> Turn | None:
        return next((turn for turn in self.turns if turn.key == key), None)

    def put(self, turn: Turn) -> None:
        """Keep `turn` in place of the one before it."""
        self.turns = [one for one in self.turns if one.key != turn.key] + [turn]


@dataclass(frozen=True, slots=True)
class Measured:
    """All turns of a contestant at a size."""

    turns: tuple[Turn, ...]

    @property
    def seconds(self) -> float | None:
        values = [value for turn in self.turns for value in turn.seconds]
        return statistics.median(values) if values else None

    @property
    def startup(self) -> float | None:
        values = [turn.startup for turn in self.turns if turn.startup is not None]
        return statistics.median(values) if values else None

    @property
    def peak(self) -> int | None:
        return max((turn.peak_bytes for turn in self.turns if turn.seconds), default=None)

    @property
    def psnr(self) -> float | None:
        """Of the picture that is farthest from torch-eager's."""
        return min((psnr(error) for turn in self.turns for error in turn.errors), default=None)

    @property
    def note(self) -> str:
        return next((turn.note for turn in self.turns if turn.note), "")


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB, of a mean squared difference of colours 0 to 255."""
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def measured(record: Record, contestant: str, size: str) -> Measured:
    return Measured(tuple(turn for turn in record.turns if (turn.contestant, turn.size) == (contestant, size)))


def page(record: Record, titles: Sequence[tuple[str, str]]) -> str:
    """Markdown: a table for each size, contestants (name and title) in this order, and what to know of them."""
    return "\n".join([_head(record), *(_section(record, size, titles) for size in record.settings.sizes)]) + "\n"


def _head(record: Record) -> str:
    settings, run = record.settings, record.runs[-1]
    where = f"{run.environment.processor}, {run.environment.cores} cores, {run.began[:10]}"
    return f"# Beside other pipelines\n\n{where}. {settings.threads} threads each. `{run.command}`\n"


def _section(record: Record, size: str, titles: Sequence[tuple[str, str]]) -> str:
    steps = record.settings.sizes[size]
    lines = [f"## {size}, {steps} steps, guidance {record.settings.guidance:g}", ""]
    lines += [_row(_HEADINGS), _row(["---", *["--:"] * (len(_HEADINGS) - 1)])]
    missing = []
    for name, title in titles:
        found = measured(record, name, size)
        if found.seconds is not None:
            lines.append(_row([title, *cells(record, name, size)]))
        elif found.turns:
            missing.append(_row([title, f"not measured: {_plain(found.note)}", *[_NOTHING] * (len(_HEADINGS) - 2)]))
    return "\n".join([*lines, *missing, *_remarks(record, size), ""])


def cells(record: Record, contestant: str, size: str) -> Iterator[str]:
    """A contestant's figures, in the order of the headings."""
    own, small, full = (measured(record, name, size) for name in (contestant, EAGER, FULL_EAGER))
    yield _number(own.seconds, "{:.2f}")
    yield _number(_over(small.seconds, own.seconds), "{:.2f}×")
    yield _number(_over(full.seconds, own.seconds), "{:.2f}×")
    yield _number(own.startup, "{:.1f}")
    yield _number(_over(own.peak, 2**30), "{:.2f}")
    yield _number(_over(own.peak, small.peak), "{:.0%}")
    yield "reference" if contestant == EAGER else _decibels(own.psnr)


def _remarks(record: Record, size: str) -> Iterator[str]:
    if size in record.apart:
        yield f"\ntorch-eager's pictures of two seeds are {_decibels(psnr(record.apart[size]))} dB apart."


def _over(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _number(value: float | None, pattern: str) -> str:
    return _NOTHING if value is None else pattern.format(value)


def _decibels(value: float | None) -> str:
    if value is not None and math.isinf(value):
        return "identical"
    return _number(value, "{:.1f}")


def _row(values: Iterable[str]) -> str:
    return f"| {' | '.join(values)} |"


def _plain(text: str) -> str:
    """On one line, and nothing that a table would take for its own."""
    return " ".join(text.split()).replace("|", "\\|")
