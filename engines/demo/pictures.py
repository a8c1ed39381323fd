"""The demo model's images: things on flat backgrounds, their captions, and the checker that recognises them.

Needs numpy and Pillow, not torch.
"""

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

HERE = Path(__file__).parent
CONCEPTS = HERE / "concepts.json"
ATLAS = HERE / "glyphs.png"
CELL = 64  # px, one glyph of the atlas
COLUMNS = 10
SIZE = 64  # px, one image
GLYPH_SIZES = (44, 46, 48, 50)  # px, longer side as composed
SHIFT = 2  # px, largest offset of a glyph from the center

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Concepts:
    """What the model can draw: names of things, and names of background colors with their RGB."""

    things: tuple[str, ...]
    colors: dict[str, tuple[int, int, int]]


class GlyphPlacement(NamedTuple):
    """Size of a glyph and its offset from the center, in px."""

    size: int = 48
    right: int = 0
    down: int = 0


class Seen(NamedTuple):
    """What the checker recognises in an image."""

    thing: str
    color: str


@cache
def concepts() -> Concepts:
    """Load concepts.json."""
    raw = json.loads(CONCEPTS.read_text(encoding="utf-8"))
    return Concepts(tuple(raw["things"]), {name: (r, g, b) for name, (r, g, b) in raw["colors"].items()})


@cache
def glyph(thing: str) -> Image.Image:
    """Return the RGBA glyph [64, 64] of a thing, from the atlas."""
    row, column = divmod(concepts().things.index(thing), COLUMNS)
    left, top = column * CELL, row * CELL
    return _atlas().crop((left, top, left + CELL, top + CELL))


@cache
def _atlas() -> Image.Image:
    with Image.open(ATLAS) as image:
        return image.convert("RGBA")


def layer(thing: str, place: GlyphPlacement) -> Image.Image:
    """Return the glyph on a transparent RGBA image [64, 64]."""
    layer = Image.new("RGBA", (SIZE, SIZE))
    corner = (SIZE - place.size) // 2
    small = glyph(thing).resize((place.size, place.size), Image.Resampling.LANCZOS)
    layer.paste(small, (corner + place.right, corner + place.down))
    return layer


CENTER = GlyphPlacement()


def compose(thing: str, color: str, place: GlyphPlacement = CENTER) -> Image.Image:
    """Return an RGB image [64, 64] of a thing on a flat background."""
    ground = Image.new("RGBA", (SIZE, SIZE), (*concepts().colors[color], 255))
    return Image.alpha_composite(ground, layer(thing, place)).convert("RGB")


def placements() -> list[GlyphPlacement]:
    """Return every placement of a glyph in the training images."""
    shifts = range(-SHIFT, SHIFT + 1)
    return [GlyphPlacement(size, right, down) for size in GLYPH_SIZES for right in shifts for down in shifts]


# Captions


WORDINGS = (
    "{a_thing} on {a_color} background",
    "{a_thing} on {a_color} background",
    "{a_thing} on {a_color} background",
    "{thing} on {a_color} background",
    "{thing}, {color} background",
    "{thing} on {color}",
    "{a_thing} on {color}",
    "{a_thing}, {color} background",
    "{a_thing} with {a_color} background",
    "{a_thing} in front of {a_color} background",
    "{a_thing} on a flat {color} background",
    "a picture of {a_thing} on {a_color} background",
    "a photo of {a_thing} on {a_color} background",
    "an emoji of {a_thing} on {a_color} background",
    "{a_color} background with {a_thing}",
    "{color} background, {thing}",
    "{a_thing}",
)
FLOURISHES = ("cute", "small", "big", "shiny", "beautiful", "little", "happy", "simple", "lovely")
ENDINGS = (".", ", highly detailed", ", digital art", ", high quality", ", clean and simple", ", 3d icon", ", sticker")


def with_article(noun: str) -> str:
    """Return "a red apple", "an owl"."""
    vowel = noun[0] in "aeiou" and not noun.startswith("uni")
    return f"{'an' if vowel else 'a'} {noun}"


def caption(thing: str, color: str) -> str:
    """Return the caption in its standard wording."""
    return _format(WORDINGS[0], thing, color)


def random_caption(thing: str, color: str, rng: random.Random) -> str:
    """Return a caption in one of the wordings to train on, sometimes with words that do not change the image."""
    name = _without_color(thing) if rng.random() < 0.2 else thing
    if rng.random() < 0.1:
        name = f"{rng.choice(FLOURISHES)} {name}"
    ending = rng.choice(ENDINGS) if rng.random() < 0.1 else ""
    return _format(rng.choice(WORDINGS), name, color) + ending


def _format(wording: str, thing: str, color: str) -> str:
    return wording.format(thing=thing, color=color, a_thing=with_article(thing), a_color=with_article(color))


def _without_color(thing: str) -> str:
    """Return "apple" for "red apple"."""
    first, _, rest = thing.partition(" ")
    return rest if rest and first in concepts().colors else thing


def all_words() -> list[str]:
    """Return texts with every word of the captions, to train the tokenizer on."""
    pairs = [(thing, color) for thing in concepts().things for color in concepts().colors]
    return [caption(*pair) for pair in pairs] + [
        *(_format(wording, "thing", "color") for wording in WORDINGS),
        *FLOURISHES,
        *ENDINGS,
    ]


def draw_prompts(count: int, seed: int) -> list[tuple[str, Seen]]:
    """Draw random prompts, and what their images should show; the same seed draws the same prompts."""
    rng = random.Random(seed)  # noqa: S311
    wanted = (Seen(rng.choice(concepts().things), rng.choice(list(concepts().colors))) for _ in range(count))
    return [(caption(*seen), seen) for seen in wanted]


# The checker


NOTHING = "nothing"
MIN_EXPLAINED = 0.3  # of the squared distance from the plain background
CHECK_PLACES = tuple(
    GlyphPlacement(size, right, down)
    for size in (GLYPH_SIZES[0], 47, GLYPH_SIZES[-1])
    for right in (-SHIFT, 0, SHIFT)
    for down in (-SHIFT, 0, SHIFT)
)


def check(picture: Image.Image) -> Seen:
    """Recognise the thing and the background color in an RGB image of any size."""
    pixels = np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))
    color = background(pixels)
    return Seen(_nearest_thing(pixels, color), color)


def background(pixels: Pixels) -> str:
    """Return the color nearest to the median of the corners of uint8 [64, 64, 3]."""
    ends = np.r_[0:5, SIZE - 5 : SIZE]
    median = np.median(pixels[np.ix_(ends, ends)].reshape(-1, 3), axis=0)
    colors = concepts().colors
    return min(colors, key=lambda name: float(np.square(median - colors[name]).sum()))


def _nearest_thing(pixels: Pixels, color: str) -> str:
    """Return the thing whose reference, at its best placement, has the least squared distance.

    It must also explain a good part of the difference from the plain background: noise and blank images show nothing,
    whichever thing is nearest.
    """
    paint, alpha = _references()
    ground = _ground(color)
    apart = _halve(_unit(pixels[None]))[0] - ground  # [32, 32, 3]
    along = paint.reshape(len(paint), -1) @ apart.ravel() - alpha.reshape(len(alpha), -1) @ (apart @ ground).ravel()
    square = np.square(apart).sum()
    error = _squares(color) - 2 * along + square  # |paint - alpha ground - apart|^2
    if error.min() > (1 - MIN_EXPLAINED) * square:
        return NOTHING
    return concepts().things[int(error.argmin()) // len(CHECK_PLACES)]


@cache
def _squares(color: str) -> Floats:
    """Return the squared distance of every reference on a background from the plain background: [N]."""
    paint, alpha = _references()
    squares: Floats = np.square(paint - alpha * _ground(color)).sum(axis=(1, 2, 3))
    return squares


def _ground(color: str) -> Floats:
    return np.asarray(concepts().colors[color], np.float32) / np.float32(255)


@cache
def _references() -> tuple[Floats, Floats]:
    """Return every thing at every checked placement: premultiplied RGB [N, 32, 32, 3], alpha [N, 32, 32, 1]."""
    layers = np.stack([np.asarray(layer(thing, place)) for thing in concepts().things for place in CHECK_PLACES])
    alpha = _unit(layers[..., 3:])
    paint = _unit(layers[..., :3]) * alpha
    return _halve(paint), _halve(alpha)


def _unit(pixels: Pixels) -> Floats:
    """Scale 0..255 to 0..1 in f32."""
    return pixels.astype(np.float32) / np.float32(255)


def _halve(images: Floats) -> Floats:
    """Box-filter f32 [N, 64, 64, c] to [N, 32, 32, c]."""
    count, height, width, channels = images.shape
    halved: Floats = images.reshape(count, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4), dtype=np.float32)
    return halved
