"""Request images from a running server and check that each shows what its prompt asks for.

    python -m engines.demo.check --url http://127.0.0.1:8000 --prompts 200 --out grid.png

Exits with 1 if fewer than 95 % of the things or 97 % of the backgrounds are right.
"""

import argparse
import io
import json
import logging
import sys
import urllib.request
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from engines.demo.pictures import SIZE, Seen, check, draw_prompts

log = logging.getLogger("engines.demo.check")

STEPS = 20
GUIDANCE = 4.0
CONCURRENCY = 4  # requests
TIMEOUT = 120  # s
MIN_THINGS = 0.95
MIN_BACKGROUNDS = 0.97


@dataclass(frozen=True)
class CheckedImage:
    """One image, what it should show, and what the checker sees in it."""

    prompt: str
    wanted: Seen
    picture: Image.Image
    seen: Seen


@dataclass(frozen=True)
class Score:
    """Number of images, and of those with the right thing and background."""

    pictures: int
    things: int
    backgrounds: int

    @property
    def passed(self) -> bool:
        """Whether both rates reach their thresholds."""
        return self.things >= MIN_THINGS * self.pictures and self.backgrounds >= MIN_BACKGROUNDS * self.pictures


def judge(prompt: str, wanted: Seen, picture: Image.Image) -> CheckedImage:
    """Run the checker on one image."""
    return CheckedImage(prompt, wanted, picture, check(picture))


def score(drawn: Sequence[CheckedImage]) -> Score:
    """Count the right things and backgrounds."""
    return Score(
        pictures=len(drawn),
        things=sum(one.seen.thing == one.wanted.thing for one in drawn),
        backgrounds=sum(one.seen.color == one.wanted.color for one in drawn),
    )


def report(drawn: Sequence[CheckedImage]) -> Score:
    """Log the two rates, and the prompt of every image that is wrong."""
    result = score(drawn)
    for what, right, needed in (
        ("things", result.things, MIN_THINGS),
        ("backgrounds", result.backgrounds, MIN_BACKGROUNDS),
    ):
        log.info(
            "%-12s %4d of %d right: %6.1f %%, needed %.0f %%",
            what,
            right,
            result.pictures,
            100 * right / result.pictures,
            100 * needed,
        )
    for one in drawn:
        if one.seen != one.wanted:
            log.info("%r shows %s, %s", one.prompt, one.seen.thing, one.seen.color)
    return result


def grid(pictures: Iterable[Image.Image], columns: int = 20) -> Image.Image:
    """Return one image with all `pictures` in rows, 2 px apart."""
    shown = list(pictures)
    pitch = SIZE + 2
    sheet = Image.new("RGB", (columns * pitch, -(-len(shown) // columns) * pitch), "white")
    for index, picture in enumerate(shown):
        row, column = divmod(index, columns)
        sheet.paste(picture.resize((SIZE, SIZE)), (column * pitch, row * pitch))
    return sheet


def request_picture(url: str, prompt: str, seed: int) -> Image.Image:
    """Request one image with `POST /generate`."""
    body = {
        "prompt": prompt,
        "seed": seed,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "scheduler": "dpmpp_2m",
    }
    request = urllib.request.Request(  # noqa: S310
        f"{url.rstrip('/')}/generate",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Accept": "image/png"},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:  # noqa: S310
        return Image.open(io.BytesIO(answer.read())).convert("RGB")


def draw_all(url: str, prompts: int, seed: int) -> list[CheckedImage]:
    """Request and check an image for each prompt, four at a time; image i uses seed + i."""
    wanted = draw_prompts(prompts, seed)
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        pictures = pool.map(lambda at: request_picture(url, wanted[at][0], seed + at), range(prompts))
        return [judge(prompt, seen, picture) for (prompt, seen), picture in zip(wanted, pictures, strict=True)]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that checking a server and evaluating a checkpoint share."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--prompts", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="PNG file to write all images to")
    return options


def conclude(drawn: Sequence[CheckedImage], out: Path | None) -> int:
    """Write the grid of images to `out`, log the report, and return the exit status."""
    if out is not None:
        grid(one.picture for one in drawn).save(out)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return 0 if report(drawn).passed else 1


def main() -> int:
    """Check one server."""
    options = parser(__doc__)
    options.add_argument("--url", default="http://127.0.0.1:8000")
    given = options.parse_args()
    return conclude(draw_all(given.url, given.prompts, given.seed), given.out)


if __name__ == "__main__":
    sys.exit(main())
