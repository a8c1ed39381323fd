"""Masks: by their colours as in diffusers' inpainting, by their transparency as in OpenAI's edits."""

from __future__ import annotations

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from engines.manifest import Size
from server.requests.uploads import fit_mask, over_latents, read, transparent_area
from tests.support.image_files import noise, saved

SIZE = Size(width=64, height=48)
HOLE = (16, 8, 47, 31)  # left, top, right, bottom, inclusive: whole blocks of 8 pixels
mask_processor = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)


def drawn(background: tuple[int, ...], hole: tuple[int, ...]) -> PIL.Image.Image:
    image = PIL.Image.new("RGBA", (SIZE.width, SIZE.height), background)
    PIL.ImageDraw.Draw(image).rectangle(HOLE, fill=hole)
    return image


def of_the_hole() -> list[list[float]]:
    mask = np.zeros((SIZE.height // 8, SIZE.width // 8))
    mask[1:4, 2:6] = 1
    return mask.tolist()


@pytest.mark.parametrize("downscale", [2, 4, 8])
def test_the_first_pixel_of_a_mask_block_decides(downscale: int) -> None:
    size = Size(width=64, height=48)
    picture = noise(size.width, size.height)
    full = mask_processor.preprocess(picture, height=size.height, width=size.width)
    expected = torch.nn.functional.interpolate(full, size=(size.height // downscale, size.width // downscale))
    assert torch.equal(torch.from_numpy(over_latents(fit_mask(picture, size), downscale=downscale)), expected[0, 0])


def test_the_mask_threshold_is_half_of_white() -> None:
    greys = PIL.Image.fromarray(np.repeat(np.array([[0, 127, 128, 255]], np.uint8), 8, axis=0).repeat(8, axis=1))
    mask = over_latents(fit_mask(read(saved(greys), field="mask"), Size(width=32, height=8)), downscale=8)
    assert mask.tolist() == [[0, 0, 1, 1]]


PHOTO = noise(SIZE.width, SIZE.height).convert("RGBA")
PIL.ImageDraw.Draw(PHOTO).rectangle(HOLE, fill=(120, 60, 30, 0))

BY_TRANSPARENCY = {
    "a photograph with a hole": PHOTO,
    "opaque black, a hole of black": drawn((0, 0, 0, 255), (0, 0, 0, 0)),
    "opaque white, a hole of black": drawn((255, 255, 255, 255), (0, 0, 0, 0)),
    "opaque white, a hole of white": drawn((255, 255, 255, 255), (255, 255, 255, 0)),
    "nearly transparent black, a hole": drawn((0, 0, 0, 1), (0, 0, 0, 0)),
    "opaque black, a hole of white": drawn((0, 0, 0, 255), (255, 255, 255, 0)),
}


@pytest.mark.parametrize("image", BY_TRANSPARENCY.values(), ids=BY_TRANSPARENCY)
@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_transparent_pixels_are_regenerated_whatever_the_colours(image_format: str, image: PIL.Image.Image) -> None:
    options = {} if image_format == "png" else {"lossless": True}
    area = transparent_area(read(saved(image, image_format, **options), field="mask"))
    assert area is not None
    assert over_latents(fit_mask(area, SIZE), downscale=8).tolist() == of_the_hole()


BY_COLOURS = {
    "white on black": drawn((0, 0, 0, 255), (255, 255, 255, 255)).convert("RGB"),
    "grey": drawn((0, 0, 0, 255), (255, 255, 255, 255)).convert("L"),
    "one bit": drawn((0, 0, 0, 255), (255, 255, 255, 255)).convert("1"),
    "opaque RGBA": drawn((0, 0, 0, 255), (255, 255, 255, 255)),
    "partly transparent everywhere": drawn((0, 0, 0, 128), (255, 255, 255, 200)),
}


@pytest.mark.parametrize("image", BY_COLOURS.values(), ids=BY_COLOURS)
def test_without_transparent_pixels_white_is_regenerated(image: PIL.Image.Image) -> None:
    mask = read(saved(image), field="mask")
    assert transparent_area(mask) is None
    assert over_latents(fit_mask(mask, SIZE), downscale=8).tolist() == of_the_hole()


def test_a_palette_with_a_transparent_entry_is_read_by_it() -> None:
    image = drawn((0, 0, 0, 255), (255, 255, 255, 255)).convert("L").point(lambda value: value // 255).convert("P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    area = transparent_area(read(saved(image, transparency=1), field="mask"))
    assert area is not None
    assert over_latents(fit_mask(area, SIZE), downscale=8).tolist() == of_the_hole()


def test_a_mask_by_colours_ignores_transparency() -> None:
    content = saved(PIL.Image.new("RGBA", (8, 8), (255, 255, 255, 0)))
    assert over_latents(fit_mask(read(content, field="mask"), Size(width=16, height=16)), downscale=8).all()
