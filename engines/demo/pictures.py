"""The demo model's small world: things on flat backgrounds, their captions, and the checker that names them.

Imports no torch, so a picture can be checked wherever numpy and Pillow are.
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
SIZE = 64  # px, one picture
GLYPH_SIZES = (44, 46, 48, 50)  # px, longer side as composed
SHIFT = 2  # px, furthest a glyph lies from the centre

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Concepts:
    """Everything the model can draw: names of things, and names of colours with their RGB."""

    things: tuple[str, ...]
    colors: dict[str, tuple[int, int, int]]


class Placement(NamedTuple):
    """Where a glyph goes: its size and its offset from the centre, in px."""

    size: int = 48
    right: int = 0
    down: int = 0


class Seen(NamedTuple):
    """What the checker sees in a picture."""

    thing: str
    color: str


@cache
def concepts() -> Concepts:
    """The shipped concepts."""
    raw = json.loads(CONCEPTS.read_text(encoding="utf-8"))
    return Concepts(tuple(raw["things"]), {name: (r, g, b) for name, (r, g, b) in raw["colors"].items()})


@cache
def glyph(thing: str) -> Image.Image:
    """RGBA [64, 64] glyph of a thing, from the atlas."""
    row, column = divmod(concepts().things.index(thing), COLUMNS)
    left, top = column * CELL, row * CELL
    return _atlas().crop((left, top, left + CELL, top + CELL))


@cache
def _atlas() -> Image.Image:
    with Image.open(ATLAS) as image:
        return image.convert("RGBA")


def layer(thing: str, place: Placement) -> Image.Image:
    """RGBA [64, 64]: the glyph placed on nothing."""
    layer = Image.new("RGBA", (SIZE, SIZE))
    corner = (SIZE - place.size) // 2
    small = glyph(thing).resize((place.size, place.size), Image.Resampling.LANCZOS)
    layer.paste(small, (corner + place.right, corner + place.down))
    return layer


CENTRE = Placement()


def compose(thing: str, color: str, place: Placement = CENTRE) -> Image.Image:
    """RGB [64, 64]: a thing on a flat background."""
    ground = Image.new("RGBA", (SIZE, SIZE), (*concepts().colors[color], 255))
    return Image.alpha_composite(ground, layer(thing, place)).convert("RGB")


def placements() -> list[Placement]:
    """Every place at which the training pictures show a glyph."""
    shifts = range(-SHIFT, SHIFT + 1)
    return [Placement(size, right, down) for size in GLYPH_SIZES for right in shifts for down in shifts]


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
    """ "a red apple", "an owl"."""
    vowel = noun[0] in "aeiou" and not noun.startswith("uni")
    return f"{'an' if vowel else 'a'} {noun}"


def caption(thing: str, color: str) -> str:
    """The canonical wording."""
    return _worded(WORDINGS[0], thing, color)


def random_caption(thing: str, color: str, rng: random.Random) -> str:
    """One of the wordings that the model learns; now and then with words that change nothing."""
    name = _without_color(thing) if rng.random() < 0.2 else thing
    if rng.random() < 0.1:
        name = f"{rng.choice(FLOURISHES)} {name}"
    ending = rng.choice(ENDINGS) if rng.random() < 0.1 else ""
    return _worded(rng.choice(WORDINGS), name, color) + ending


def _worded(wording: str, thing: str, color: str) -> str:
    return wording.format(thing=thing, color=color, a_thing=with_article(thing), a_color=with_article(color))


def _without_color(thing: str) -> str:
    """ "red apple" is also an "apple"."""
    first, _, rest = thing.partition(" ")
    return rest if rest and first in concepts().colors else thing


def all_words() -> list[str]:
    """Texts that hold every word a caption can have, for training the tokenizer."""
    pairs = [(thing, color) for thing in concepts().things for color in concepts().colors]
    return [caption(*pair) for pair in pairs] + [
        *(_worded(wording, "thing", "color") for wording in WORDINGS),
        *FLOURISHES,
        *ENDINGS,
    ]


def draw_prompts(count: int, seed: int) -> list[tuple[str, Seen]]:
    """Canonical prompts with what their pictures should show; the same seed draws the same prompts."""
    rng = random.Random(seed)  # noqa: S311
    wanted = (Seen(rng.choice(concepts().things), rng.choice(list(concepts().colors))) for _ in range(count))
    return [(caption(*seen), seen) for seen in wanted]


# The checker


NOTHING = "nothing"
MIN_EXPLAINED = 0.3  # share of the picture's squared distance from the bare ground
CHECK_PLACES = tuple(
    Placement(size, right, down)
    for size in (GLYPH_SIZES[0], 47, GLYPH_SIZES[-1])
    for right in (-SHIFT, 0, SHIFT)
    for down in (-SHIFT, 0, SHIFT)
)


def check(picture: Image.Image) -> Seen:
    """Names the thing and the background colour in an RGB picture of any size."""
    pixels = np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))
    color = background(pixels)
    return Seen(_nearest_thing(pixels, color), color)


def background(pixels: Pixels) -> str:
    """The palette's nearest colour to the median of the corners of uint8 [64, 64, 3]."""
    ends = np.r_[0:5, SIZE - 5 : SIZE]
    median = np.median(pixels[np.ix_(ends, ends)].reshape(-1, 3), axis=0)
    colors = concepts().colors
    return min(colors, key=lambda name: float(np.square(median - colors[name]).sum()))


def _nearest_thing(pixels: Pixels, color: str) -> str:
    """The thing whose reference, at its best placement, is the least squared distance away.

    It must also explain a good part of what sets the picture apart from the bare ground: noise and blank pictures show
    nothing, whatever is nearest.
    """
    paint, alpha = _references()
    picture = _halve(_unit(pixels[None]))
    ground = np.asarray(concepts().colors[color], np.float32) / np.float32(255)
    error = np.square(paint + (1 - alpha) * ground - picture).mean(axis=(1, 2, 3))
    apart = np.square(ground - picture).mean()
    if error.min() > (1 - MIN_EXPLAINED) * apart:
        return NOTHING
    return concepts().things[int(error.argmin()) // len(CHECK_PLACES)]


@cache
def _references() -> tuple[Floats, Floats]:
    """Every thing at every checked placement: premultiplied RGB [N, 32, 32, 3] and alpha [N, 32, 32, 1] in 0..1."""
    layers = np.stack([np.asarray(layer(thing, place)) for thing in concepts().things for place in CHECK_PLACES])
    alpha = _unit(layers[..., 3:])
    paint = _unit(layers[..., :3]) * alpha
    return _halve(paint), _halve(alpha)


def _unit(pixels: Pixels) -> Floats:
    """0..255 to 0..1 in f32."""
    return pixels.astype(np.float32) / np.float32(255)


def _halve(images: Floats) -> Floats:
    """Box-filters f32 [N, 64, 64, c] to [N, 32, 32, c]."""
    count, height, width, channels = images.shape
    halved: Floats = images.reshape(count, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4), dtype=np.float32)
    return halved
