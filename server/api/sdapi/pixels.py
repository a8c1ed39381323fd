"""Operations on images and masks of the same size: masks are in L, and white where an image is repainted."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL import ImageFilter

from engines.manifest import Size
from server.requests.params import Image

Box = tuple[int, int, int, int]  # left, upper, right, lower

_RADII = (2, 8, 32, 128)  # pixels: how far away the colours are that an area is filled with, nearest first
_FEWEST = 0.02  # share of known pixels within a radius


def grow(box: Box, *, within: tuple[int, int], shape: Size, padding: int) -> Box:
    """`box` with `padding`, then wider or taller until it has the `shape`, as far as the image has room."""
    left, upper, right, lower = box
    width, height = right - left + 2 * padding, lower - upper + 2 * padding
    ratio = shape.width / shape.height
    width, height = max(width, round(height * ratio)), max(height, round(width / ratio))
    x, across = _span((left + right) / 2, width, within[0])
    y, down = _span((upper + lower) / 2, height, within[1])
    return x, y, x + across, y + down


def fill(image: PIL.Image.Image, mask: PIL.Image.Image) -> PIL.Image.Image:
    """`image` with the area of `mask` in the colours around it: those within the least radius that has enough."""
    known = mask.point([255] + [0] * 255)  # nothing of what is repainted, however little, gives its colour
    black = PIL.Image.new("RGB", image.size)
    seen = PIL.Image.composite(image, black, known)
    pixels = np.asarray(image, np.float32)
    missing = np.asarray(mask, np.float32)[..., None] / 255
    colours: NDArray[np.float32] = np.broadcast_to(_mean(seen, known), pixels.shape)
    for radius in reversed(_RADII):
        share = np.asarray(_blurred(known, radius), np.float32)[..., None] / 255
        near = np.asarray(_blurred(seen, radius), np.float32) / np.maximum(share, _FEWEST)
        colours = np.where(share > _FEWEST, near, colours)
    filled = pixels * (1 - missing) + colours * missing
    return PIL.Image.fromarray(filled.clip(0, 255).round().astype(np.uint8))


def _mean(seen: PIL.Image.Image, known: PIL.Image.Image) -> NDArray[np.float32]:
    """The mean colour of the known pixels; grey where there are none."""
    share = np.asarray(known, np.float32).mean() / 255
    if share == 0:
        return np.full(3, 127.5, np.float32)
    mean: NDArray[np.float32] = np.asarray(seen, np.float32).mean((0, 1)) / share
    return mean


def _blurred(image: PIL.Image.Image, radius: int) -> PIL.Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def _span(centre: float, length: int, most: int) -> tuple[int, int]:
    """The start and the length of a span within 0..most, as near to `centre` as it fits."""
    length = min(length, most)
    return min(max(round(centre - length / 2), 0), most - length), length


def flatten(image: PIL.Image.Image) -> PIL.Image.Image:
    """`image` in RGB, on white where it is transparent."""
    if image.mode == "RGBA":
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def greys(mask: PIL.Image.Image) -> PIL.Image.Image:
    """The mask in L: of one with transparent pixels its opaque area is white, as in the web UI."""
    if mask.mode == "RGBA" and mask.getchannel("A").getextrema()[0] != 255:
        return mask.getchannel("A").point([0] * 128 + [255] * 128)
    return mask.convert("L")


def composite(above: PIL.Image.Image, below: PIL.Image.Image, mask: PIL.Image.Image) -> Image:
    return np.asarray(PIL.Image.composite(above, below, mask))


def with_borders(image: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """`image` in the middle of `size`; its edges go on to the borders."""
    left, upper = (size[0] - image.width) // 2, (size[1] - image.height) // 2
    margins = [(upper, size[1] - image.height - upper), (left, size[0] - image.width - left)]
    pixels = np.asarray(image)
    return PIL.Image.fromarray(np.pad(pixels, [*margins, (0, 0)][: pixels.ndim], mode="edge"))


def png(image: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png", compress_level=1)
    return file.getvalue()
