"""Areas, fills and borders."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.manifest import Size
from server.api.sdapi import pixels

SQUARE = Size(width=64, height=64)
WIDE = Size(width=128, height=64)


@pytest.mark.parametrize(
    ("box", "shape", "padding", "expected"),
    [
        ((40, 40, 60, 60), SQUARE, 0, (40, 40, 60, 60)),
        ((40, 40, 60, 60), SQUARE, 5, (35, 35, 65, 65)),
        ((40, 40, 60, 60), WIDE, 0, (30, 40, 70, 60)),
        ((40, 20, 60, 80), SQUARE, 0, (20, 20, 80, 80)),
        ((0, 0, 10, 10), WIDE, 0, (0, 0, 20, 10)),
        ((90, 90, 100, 100), SQUARE, 20, (50, 50, 100, 100)),
        ((0, 0, 100, 100), WIDE, 9, (0, 0, 100, 100)),
    ],
)
def test_the_area_has_the_shape_of_the_size(box: pixels.Box, shape: Size, padding: int, expected: pixels.Box) -> None:
    assert pixels.grow(box, within=(100, 100), shape=shape, padding=padding) == expected


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_the_area_contains_the_mask_and_lies_in_the_image(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    left, upper = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, lower = data.draw(st.integers(left + 1, width)), data.draw(st.integers(upper + 1, height))
    shape = data.draw(st.sampled_from([SQUARE, WIDE, Size(width=64, height=512)]))
    found = pixels.grow((left, upper, right, lower), within=(width, height), shape=shape, padding=0)
    assert 0 <= found[0] <= left
    assert 0 <= found[1] <= upper
    assert right <= found[2] <= width
    assert lower <= found[3] <= height


def halves() -> PIL.Image.Image:
    """Red on the left, blue on the right."""
    image = PIL.Image.new("RGB", (64, 32), "red")
    image.paste("blue", (32, 0, 64, 32))
    return image


def test_a_masked_area_takes_the_colours_around_it() -> None:
    image, mask = halves(), PIL.Image.new("L", (64, 32))
    image.paste("white", (4, 8, 20, 24))
    mask.paste(255, (4, 8, 20, 24))
    filled = np.asarray(pixels.fill(image, mask))
    red, _, blue = filled[16, 12]
    assert red > 245
    assert blue < 10
    assert (filled[:, 32:] == np.asarray(halves())[:, 32:]).all()


def test_a_mask_of_everything_has_no_colours_around_it() -> None:
    assert np.asarray(pixels.fill(halves(), PIL.Image.new("L", (64, 32), 255))).std() == 0


def test_borders_go_on_with_the_edges() -> None:
    bordered = pixels.with_borders(halves(), (64, 64))
    assert bordered.size == (64, 64)
    assert (bordered.getpixel((3, 1)), bordered.getpixel((60, 62))) == ((255, 0, 0), (0, 0, 255))
    assert pixels.with_borders(PIL.Image.new("L", (64, 32), 7), (64, 64)).getpixel((0, 0)) == 7


def test_an_opaque_area_is_the_mask() -> None:
    mask = PIL.Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    mask.paste((0, 0, 0, 255), (0, 0, 2, 2))
    assert np.asarray(pixels.greys(mask))[:, 0].tolist() == [255, 255, 0, 0]
    assert pixels.greys(PIL.Image.new("RGBA", (1, 1), "white")).getpixel((0, 0)) == 255


def test_transparent_pixels_become_white() -> None:
    assert pixels.flatten(PIL.Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
