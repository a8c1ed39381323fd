"""The results file, and its tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from statistics import fmean

import numpy as np
from pydantic import Field

from loadtest.provenance import ResultModel, Run
from server.requests.depths import Cache

CACHES: tuple[Cache, ...] = ("off", "fast", "faster")


class Spread(ResultModel):
    """A figure of many images."""

    median: float
    p5: float = Field(description="5th percentile: one image in twenty has less")

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median=round(float(np.median(values)), 3), p5=round(float(np.percentile(values, 5)), 3))


class Cell(ResultModel):
    """All prompts with one scheduler, number of steps and cache."""

    scheduler: str
    steps: int
    cache: Cache
    calls: int = Field(description="UNet calls of an image")
    full: int = Field(description="of these in full")
    rows: float = Field(description="UNet rows of an image, over all calls; mean")
    things: int = Field(description="images with the right thing")
    backgrounds: int = Field(description="images with the right background")
    right: int = Field(description="images with both")
    psnr: Spread | None = Field(description="dB, compared with cache off; null of off itself")
    ssim: Spread | None = Field(description="likewise")

    @property
    def key(self) -> tuple[str, int, Cache]:
        return self.scheduler, self.steps, self.cache


class QualityResults(ResultModel):
    """The results file."""

    run: Run
    model: str
    backend: str
    prompts: int = Field(description="images of each cell")
    guidance: float
    cells: tuple[Cell, ...]

    @property
    def by_key(self) -> dict[tuple[str, int, Cache], Cell]:
        return {cell.key: cell for cell in self.cells}


def page_tables(results: QualityResults) -> str:
    """The tables of the page, in Markdown: over all schedulers, and each scheduler."""
    return "\n".join((*_summary(results), "", *_by_scheduler(results)))


def _summary(results: QualityResults) -> Iterator[str]:
    yield "| steps | `cache` | full calls | rows | right | least of a scheduler | PSNR | SSIM |"
    yield "|---|---|---|---|---|---|---|---|"
    for steps, cache in product(_steps(results), CACHES):
        cells = [cell for cell in results.cells if (cell.steps, cell.cache) == (steps, cache)]
        if cells:
            shares = [cell.right / results.prompts for cell in cells]
            yield _row(
                str(steps),
                f"`{cache}`",
                f"{fmean(cell.full / cell.calls for cell in cells):.0%}",
                f"{fmean(cell.rows / (2 * cell.calls) for cell in cells):.0%}",
                f"{fmean(shares):.1%}",
                f"{min(shares):.1%}",
                _mean([cell.psnr for cell in cells], "{:.1f} dB"),
                _mean([cell.ssim for cell in cells], "{:.3f}"),
            )


def _by_scheduler(results: QualityResults) -> Iterator[str]:
    headings = "scheduler", "steps", "right: off, fast, faster", "full calls", "rows"
    yield _row(*headings, "PSNR: fast", "faster", "SSIM: fast", "faster")
    yield "|---|---|---|---|---|---|---|---|---|"
    found = results.by_key
    for scheduler, steps in dict.fromkeys((cell.scheduler, cell.steps) for cell in results.cells):
        off, fast, faster = (found.get((scheduler, steps, cache)) for cache in CACHES)
        if off and fast and faster:
            yield _row(
                f"`{scheduler}`",
                str(steps),
                ", ".join(f"{cell.right / results.prompts:.1%}" for cell in (off, fast, faster)),
                ", ".join(str(cell.full) for cell in (off, fast, faster)),
                ", ".join(f"{cell.rows:.0f}" for cell in (off, fast, faster)),
                *(_both(cell.psnr, "{:.1f}") for cell in (fast, faster)),
                *(_both(cell.ssim, "{:.3f}") for cell in (fast, faster)),
            )


def _steps(results: QualityResults) -> list[int]:
    return sorted({cell.steps for cell in results.cells})


def _mean(spreads: Sequence[Spread | None], form: str) -> str:
    medians = [one.median for one in spreads if one]
    return form.format(fmean(medians)) if medians else ""


def _both(spread: Spread | None, form: str) -> str:
    return f"{form.format(spread.median)}, {form.format(spread.p5)}" if spread else ""


def _row(*values: str) -> str:
    return f"| {' | '.join(values)} |"
