"""Measures what the step cache saves and how much it changes images: the same requests with and without it."""

from __future__ import annotations

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
from pydantic import BaseModel, Field, PositiveInt
from pydantic_settings import SettingsConfigDict
from rich.console import Console
from rich.progress import track
from rich.table import Table
from skimage.metrics import structural_similarity

from benchmarks.cli import Seconds, complain
from engines.accuracy import psnr
from engines.cli import CommandLine, RepeatableList, parse
from engines.files import write_atomically
from loadtest.provenance import Run, begin_run, now

Rgb = NDArray[np.uint8]  # [H, W, 3]

_SIGMA = 1.5  # pixels, of the Gaussian window in Wang et al.
_SCHEDULERS, _STEPS = ("dpmpp_2m", "euler", "ddim"), (20, 50)


class Pair(BaseModel):
    """One request without the cache, and the same with it."""

    prompt: str
    seed: int
    seconds: tuple[float, float]  # of denoising, as the server times it: cache off, cache fast
    psnr: float  # dB; 999 where the images are identical
    ssim: float


class Case(BaseModel):
    """All pairs of one scheduler and number of steps."""

    scheduler: str
    steps: int
    pairs: list[Pair]

    @property
    def speed_up(self) -> float:
        return statistics.median(off / fast for off, fast in (pair.seconds for pair in self.pairs))


class StepCacheCommand(CommandLine):
    """Compare requests with and without the step cache on a running server, which should have no other work.

    python -m benchmarks.server.step_cache --url http://127.0.0.1:8000 --out step-cache.json

    The results file has one entry for each scheduler and number of steps.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m benchmarks.server.step_cache")

    url: str = Field(description="address of the server")
    out: Path = Field(description="JSON file to write the results to")
    scheduler: RepeatableList[str] = Field(_SCHEDULERS, description="schedulers to measure, repeatable")
    steps: RepeatableList[PositiveInt] = Field(_STEPS, description="denoising steps, repeatable")
    prompt: RepeatableList[str] = Field((), description="prompts, repeatable; unless given, the model's examples")
    seeds: PositiveInt = Field(6, description="how many of the model's examples to use at most")
    timeout: Seconds = Field(600.0, description="seconds an image may take")


class StepCacheResults(BaseModel):
    """The results file."""

    run: Run
    models: list[dict[str, Any]]
    cases: list[Case]


@dataclass(frozen=True, slots=True)
class _TimedImage:
    image: Rgb
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(StepCacheCommand, words)
    run, console = begin_run(["python", "-m", "benchmarks.server.step_cache", *words]), Console()
    try:
        with httpx.Client(base_url=options.url, timeout=options.timeout) as http:
            models = http.get("/models").raise_for_status().json()
            prompts = options.prompt or models[0]["examples"][: options.seeds]
            combinations = list(product(options.scheduler, options.steps))
            cases = [_case(http, *one, prompts) for one in track(combinations, "measuring", console=console)]
    except httpx.HTTPError as error:
        complain(f"{options.url}: {error}")
        return 2
    results = StepCacheResults(run=run.model_copy(update={"ended": now()}), models=models, cases=cases)
    write_atomically(options.out, results.model_dump_json(indent=1).encode())
    console.print(table(results))
    return 0


def table(results: StepCacheResults) -> Table:
    """Each case, for people."""
    made = Table(title="Step cache: fast compared with off")
    for heading in (
        "scheduler",
        "steps",
        "speed-up of denoising",
        "median PSNR, dB",
        "lowest PSNR, dB",
        "median SSIM",
        "lowest SSIM",
    ):
        made.add_column(heading)
    for case in results.cases:
        decibels, similarity = [pair.psnr for pair in case.pairs], [pair.ssim for pair in case.pairs]
        made.add_row(
            case.scheduler,
            str(case.steps),
            f"{case.speed_up:.2f}×",
            f"{statistics.median(decibels):.1f}",
            f"{min(decibels):.1f}",
            f"{statistics.median(similarity):.3f}",
            f"{min(similarity):.3f}",
        )
    return made


def ssim(image: Rgb, other: Rgb) -> float:
    """Structural similarity of luma, 1 for identical images; with the window of Wang et al. (2004)."""
    x, y = (one @ np.array([0.299, 0.587, 0.114]) for one in (image, other))
    return float(
        structural_similarity(x, y, data_range=255, gaussian_weights=True, sigma=_SIGMA, use_sample_covariance=False)
    )


def _case(http: httpx.Client, scheduler: str, steps: int, prompts: Sequence[str]) -> Case:
    fields = {"scheduler": scheduler, "num_inference_steps": steps}
    return Case(scheduler=scheduler, steps=steps, pairs=list(_pairs(http, fields, prompts)))


def _pairs(http: httpx.Client, fields: dict[str, Any], prompts: Sequence[str]) -> Iterator[Pair]:
    for seed, prompt in enumerate(prompts, start=1):
        request = {**fields, "prompt": prompt, "seed": seed}
        off, fast = (_generate(http, {**request, "cache": cache}) for cache in ("off", "fast"))
        yield Pair(
            prompt=prompt,
            seed=seed,
            seconds=(off.seconds, fast.seconds),
            psnr=psnr(off.image, fast.image),
            ssim=ssim(off.image, fast.image),
        )


def _generate(http: httpx.Client, body: dict[str, Any]) -> _TimedImage:
    document = http.post("/generate", json=body).raise_for_status().json()
    file = io.BytesIO(base64.b64decode(document["images"][0]["image"]))
    image: Rgb = np.asarray(PIL.Image.open(file).convert("RGB"))
    return _TimedImage(image, document["timings"]["denoise"])


if __name__ == "__main__":
    sys.exit(main())
