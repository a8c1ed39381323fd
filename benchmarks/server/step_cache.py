"""Measures what the step cache saves and how much it changes images: the same requests with and without it."""

from __future__ import annotations

import base64
import io
import statistics
import sys
from collections.abc import Sequence
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
from server.requests.depths import Cache

Rgb = NDArray[np.uint8]  # [H, W, 3]

_SIGMA = 1.5  # pixels, of the Gaussian window in Wang et al.
_CACHES: tuple[Cache, ...] = ("fast", "faster")
_SCHEDULERS, _STEPS = ("dpmpp_2m", "euler", "ddim"), (20, 50)


class Pair(BaseModel):
    """One request without the cache, and the same with it."""

    prompt: str
    seed: int
    seconds: tuple[float, float]  # of denoising, as the server times it: without and with
    psnr: float  # dB; 999 where the images are identical
    ssim: float


class Case(BaseModel):
    """All pairs of one scheduler, number of steps and `cache`."""

    scheduler: str
    steps: int
    cache: Cache
    pairs: list[Pair]

    @property
    def speed_up(self) -> float:
        return statistics.median(without / cached for without, cached in (pair.seconds for pair in self.pairs))


class StepCacheCommand(CommandLine):
    """Compare requests with and without the step cache on a running server, which should have no other work.

    python -m benchmarks.server.step_cache --url http://127.0.0.1:8000 --out step-cache.json

    The results file has one entry for each scheduler, number of steps and `cache`.
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
            cases = [
                case
                for one in track(combinations, "measuring", console=console)
                for case in _cases(http, *one, prompts)
            ]
    except httpx.HTTPError as error:
        complain(f"{options.url}: {error}")
        return 2
    results = StepCacheResults(run=run.model_copy(update={"ended": now()}), models=models, cases=cases)
    write_atomically(options.out, results.model_dump_json(indent=1).encode())
    console.print(table(results))
    return 0


def table(results: StepCacheResults) -> Table:
    """Each case, for people."""
    made = Table(title="Step cache: speed-up of denoising; median and lowest PSNR and SSIM to off")
    for heading in (
        "scheduler",
        "steps",
        "cache",
        "speed-up",
        "PSNR, dB",
        "lowest",
        "SSIM",
        "lowest",
    ):
        made.add_column(heading)
    for case in results.cases:
        decibels, similarity = [pair.psnr for pair in case.pairs], [pair.ssim for pair in case.pairs]
        made.add_row(
            case.scheduler,
            str(case.steps),
            case.cache,
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


def _cases(http: httpx.Client, scheduler: str, steps: int, prompts: Sequence[str]) -> list[Case]:
    cases = [Case(scheduler=scheduler, steps=steps, cache=cache, pairs=[]) for cache in _CACHES]
    for seed, prompt in enumerate(prompts, start=1):
        request = {"scheduler": scheduler, "num_inference_steps": steps, "prompt": prompt, "seed": seed}
        without = _generate(http, {**request, "cache": "off"})
        for case in cases:
            cached = _generate(http, {**request, "cache": case.cache})
            case.pairs.append(
                Pair(
                    prompt=prompt,
                    seed=seed,
                    seconds=(without.seconds, cached.seconds),
                    psnr=psnr(without.image, cached.image),
                    ssim=ssim(without.image, cached.image),
                )
            )
    return cases


def _generate(http: httpx.Client, body: dict[str, Any]) -> _TimedImage:
    document = http.post("/generate", json=body).raise_for_status().json()
    file = io.BytesIO(base64.b64decode(document["images"][0]["image"]))
    image: Rgb = np.asarray(PIL.Image.open(file).convert("RGB"))
    return _TimedImage(image, document["timings"]["denoise"])


if __name__ == "__main__":
    sys.exit(main())
