"""Image files for tests: noise, saved by PIL, and PNGs put together chunk by chunk."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import PIL.Image


def noise(width: int = 61, height: int = 37) -> PIL.Image.Image:
    """An RGB picture of odd size, with every value in it somewhere."""
    return PIL.Image.fromarray(np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8))


def saved(picture: PIL.Image.Image, image_format: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, image_format, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colours: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")
