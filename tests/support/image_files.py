"""Image files for tests: noise, saved by PIL, and PNGs put together chunk by chunk."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import PIL.Image


def noise(width: int = 61, height: int = 37) -> PIL.Image.Image:
    """An RGB picture of odd size, with every value in it somewhere."""
    return PIL.Image.fromarray(np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8))


def picture(width: int, height: int) -> PIL.Image.Image:
    """Colours that change smoothly, so that codecs and resizing agree on them."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([x, y, np.sin(6 * x * y) ** 2], axis=-1)
    return PIL.Image.fromarray((255 * pixels).astype(np.uint8))


def mask(width: int, height: int) -> PIL.Image.Image:
    """White, to be drawn anew, in the middle."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 255
    return PIL.Image.fromarray(pixels)


def saved(image: PIL.Image.Image, image_format: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def text_of(image: PIL.Image.Image, image_format: str = "png") -> str:
    """The file in base64."""
    return base64.b64encode(saved(image, image_format)).decode()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colours: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")
