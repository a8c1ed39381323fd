"""Images of the demo model by each scheduler, number of steps and cache, checked and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from benchmarks.inprocess import Drawn, Served
from benchmarks.quality.results import CACHES, Cell, Spread
from benchmarks.server.step_cache import ssim
from engines.accuracy import psnr
from engines.demo.check import GUIDANCE
from engines.demo.pictures import Seen, check, draw_prompts
from server.requests.depths import Cache
from server.requests.request import Request
from server.requests.schemas import GenerateRequest

Rgb = NDArray[np.uint8]  # [H, W, 3]


@dataclass(frozen=True, slots=True)
class _Judged:
    """One image, and what the demo's checker sees in it."""

    image: Rgb
    request: Request
    has_thing: bool
    has_background: bool


def measure(
    served: Served, scheduler: str, steps: int, *, prompts: int, seed: int, on_image: Callable[[], None]
) -> Iterator[Cell]:
    """The cells of one scheduler and number of steps. Raises EngineError, InvalidRequest."""
    wanted = draw_prompts(prompts, seed)
    plain: Sequence[_Judged] = ()
    for cache in CACHES:
        bodies = [_body(prompt, scheduler, steps, cache, seed + at) for at, (prompt, _) in enumerate(wanted)]
        rows = served.rows
        judged = _judge_all(served.draw_all(bodies), [seen for _, seen in wanted], on_image)
        plain = plain or judged
        yield _cell(scheduler, steps, cache, judged, plain, (served.rows - rows) / prompts)


def sheet(served: Served, scheduler: str, steps: int, *, prompts: int, seed: int) -> PIL.Image.Image:
    """A row of images for each prompt, a column for each cache; enlarged, as the demo's are small."""
    wanted = draw_prompts(prompts, seed)
    bodies = [
        _body(prompt, scheduler, steps, cache, seed + at) for at, (prompt, _) in enumerate(wanted) for cache in CACHES
    ]
    images = {drawn.number: drawn.image for drawn in served.draw_all(bodies)}
    rows = [
        np.concatenate([images[at + column] for column in range(len(CACHES))], axis=1)
        for at in range(0, len(bodies), len(CACHES))
    ]
    pixels = np.concatenate(rows)
    return PIL.Image.fromarray(pixels).resize((2 * pixels.shape[1], 2 * pixels.shape[0]), PIL.Image.Resampling.NEAREST)


def _body(prompt: str, scheduler: str, steps: int, cache: Cache, seed: int) -> GenerateRequest:
    return GenerateRequest(
        prompt=prompt,
        scheduler=scheduler,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        cache=cache,
        seed=seed,
    )


def _judge_all(drawn: Iterator[Drawn], wanted: Sequence[Seen], on_image: Callable[[], None]) -> list[_Judged]:
    """In the order of the requests, whichever ends first."""
    found = dict[int, _Judged]()
    for one in drawn:
        seen, should = check(PIL.Image.fromarray(one.image)), wanted[one.number]
        found[one.number] = _Judged(one.image, one.request, seen.thing == should.thing, seen.color == should.color)
        on_image()
    return [found[number] for number in range(len(wanted))]


def _cell(
    scheduler: str, steps: int, cache: Cache, judged: Sequence[_Judged], plain: Sequence[_Judged], rows: float
) -> Cell:
    pairs = [] if cache == "off" else [(one.image, other.image) for one, other in zip(judged, plain, strict=True)]
    depths = judged[0].request.depths
    return Cell(
        scheduler=scheduler,
        steps=steps,
        cache=cache,
        calls=len(depths),
        full=depths.count("full"),
        rows=round(rows, 2),
        things=sum(one.has_thing for one in judged),
        backgrounds=sum(one.has_background for one in judged),
        right=sum(one.has_thing and one.has_background for one in judged),
        psnr=Spread.of([psnr(*pair) for pair in pairs]) if pairs else None,
        ssim=Spread.of([ssim(*pair) for pair in pairs]) if pairs else None,
    )
