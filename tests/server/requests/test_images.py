"""Encoding of images, and decoding them again."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest

from server.requests.images import FORMATS, ImageFormat, encode


def gradient() -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    y, x = np.mgrid[0:40, 0:64]
    return np.stack([x * 4, y * 6, (x + y) * 2], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_file_decodes_to_its_pixels(image_format: ImageFormat) -> None:
    picture = PIL.Image.open(io.BytesIO(encode(gradient(), image_format)))
    assert picture.format == image_format.upper()
    assert picture.size == (64, 40)
    assert np.abs(np.asarray(picture.convert("RGB"), np.int16) - gradient()).mean() < 3


def test_png_is_lossless() -> None:
    assert np.array_equal(np.asarray(PIL.Image.open(io.BytesIO(encode(gradient(), "png")))), gradient())


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_same_pixels_give_the_same_bytes(image_format: ImageFormat) -> None:
    assert encode(gradient(), image_format) == encode(gradient(), image_format)


def test_a_photograph_is_no_larger_than_at_the_default_level() -> None:
    """Which is what the quicker way of packing must not cost."""
    dice = np.random.default_rng(0)
    grain = gradient() // 2 + dice.integers(0, 8, (40, 64, 3), np.uint8)
    usual = io.BytesIO()
    PIL.Image.fromarray(grain).save(usual, "png")
    assert len(encode(grain, "png")) <= len(usual.getvalue()) * 1.02
