"""What the step cache saves, and what it does to pictures: the same requests with and without it, one after the other.

python -m benchmarks.server.step_cache --url http://127.0.0.1:8000 --out step-cache.json

Run it while nobody else is served. The figures lie in the file, one entry for each scheduler and number of steps.
"""

from __future__ import annotations

import argparse
import base64
import io
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
from numpy.typing import NDArray
from pydantic import BaseModel
from rich.console import Console
from rich.progress import track
from rich.table import Table

from engines.accuracy import psnr
from engines.files import write_atomically
from loadtest.provenance import Run, begin_run, now

Picture = NDArray[np.uint8]  # [H, W, 3]

_WINDOW, _SPREAD = 11, 1.5  # pixels, of the Gaussian that SSIM looks through
_SCHEDULERS, _STEPS = ("dpmpp_2m", "euler", "ddim"), (20, 50)


class Pair(BaseModel):
    """One request without the cache, and with it."""

    prompt: str
    seed: int
    seconds: tuple[float, float]  # of the steps, as the server times them
    psnr: float  # dB; 999 where the pictures are identical
    ssim: float


class Case(BaseModel):
    """All pairs of one scheduler and number of steps."""

    scheduler: str
    steps: int
    pairs: list[Pair]

    @property
    def times_quicker(self) -> float:
        return statistics.median(off / fast for off, fast in (pair.seconds for pair in self.pairs))


class Report(BaseModel):
    """Everything that was found."""

    run: Run
    models: list[dict[str, Any]]
    cases: list[Case]


@dataclass(frozen=True, slots=True)
class _Drawn:
    picture: Picture
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    given = _parser().parse_args(words)
    run, console = begin_run(["python", "-m", "benchmarks.server.step_cache", *words]), Console()
    try:
        with httpx.Client(base_url=given.url, timeout=given.timeout) as http:
            models = http.get("/models").raise_for_status().json()
            prompts = given.prompt or models[0]["examples"][: given.seeds]
            cases = [
                _case(http, scheduler, steps, prompts)
                for scheduler, steps in track(
                    list(product(given.scheduler or _SCHEDULERS, given.steps or _STEPS)), console=console
                )
            ]
    except httpx.HTTPError as error:
        console.print(f"[bold red]error:[/] {given.url}: {error}", soft_wrap=True)
        return 2
    report = Report(run=run.model_copy(update={"ended": now()}), models=models, cases=cases)
    write_atomically(given.out, report.model_dump_json(indent=1).encode())
    console.print(table(report))
    return 0


def table(report: Report) -> Table:
    made = Table(title="The step cache, fast beside off")
    for column in ("scheduler", "steps", "steps quicker by", "PSNR dB, median", "least", "SSIM, median", "least"):
        made.add_column(column)
    for case in report.cases:
        decibels, likeness = [pair.psnr for pair in case.pairs], [pair.ssim for pair in case.pairs]
        made.add_row(
            case.scheduler,
            str(case.steps),
            f"{case.times_quicker:.2f}",
            f"{statistics.median(decibels):.1f}",
            f"{min(decibels):.1f}",
            f"{statistics.median(likeness):.3f}",
            f"{min(likeness):.3f}",
        )
    return made


def ssim(picture: Picture, other: Picture) -> float:
    """Structural similarity of luma, 1 for identical pictures; Wang et al. (2004), eq. 13."""
    x, y = (one @ np.array([0.299, 0.587, 0.114]) for one in (picture, other))
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x, variance_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(likeness / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))))


def _blurred(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Through the Gaussian window, where all of it lies within."""
    weights = np.exp(-((np.arange(_WINDOW) - _WINDOW // 2) ** 2) / (2 * _SPREAD**2))
    weights /= weights.sum()
    for axis in (0, 1):
        values = np.lib.stride_tricks.sliding_window_view(values, _WINDOW, axis=axis) @ weights
    return values


def _case(http: httpx.Client, scheduler: str, steps: int, prompts: Sequence[str]) -> Case:
    asked = {"scheduler": scheduler, "num_inference_steps": steps}
    return Case(scheduler=scheduler, steps=steps, pairs=list(_pairs(http, asked, prompts)))


def _pairs(http: httpx.Client, asked: dict[str, Any], prompts: Sequence[str]) -> Iterator[Pair]:
    for seed, prompt in enumerate(prompts, start=1):
        off, fast = (
            _draw(http, {**asked, "prompt": prompt, "seed": seed, "cache": cache}) for cache in ("off", "fast")
        )
        yield Pair(
            prompt=prompt,
            seed=seed,
            seconds=(off.seconds, fast.seconds),
            psnr=psnr(off.picture, fast.picture),
            ssim=ssim(off.picture, fast.picture),
        )


def _draw(http: httpx.Client, body: dict[str, Any]) -> _Drawn:
    document = http.post("/generate", json=body).raise_for_status().json()
    file = io.BytesIO(base64.b64decode(document["images"][0]["image"]))
    picture: Picture = np.asarray(PIL.Image.open(file).convert("RGB"))
    return _Drawn(picture, document["timings"]["denoise"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.server.step_cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--url", required=True, help="the server's address")
    add("--out", required=True, type=Path, metavar="FILE", help="the JSON file to write")
    add("--scheduler", action="append", default=[], help="repeatable (default: dpmpp_2m, euler, ddim)")
    add("--steps", type=int, action="append", default=[], help="repeatable (default: 20 and 50)")
    add("--prompt", action="append", default=[], help="repeatable; each has a seed (default: the model's examples)")
    add("--seeds", type=int, default=6, help="how many of the model's examples at most (default: %(default)s)")
    add("--timeout", type=float, default=600, help="seconds a picture may take (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
