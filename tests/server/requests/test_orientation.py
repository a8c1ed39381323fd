"""Images are turned upright as PIL's `exif_transpose` does it, whatever else their metadata holds."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL.ExifTags import Base
from PIL.PngImagePlugin import PngInfo

from server.requests.uploads import read
from tests.support.image_files import noise, saved

XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description %s</rdf:Description></x:xmpmeta>'
KINDS = {"SHORT": (3, "H"), "LONG": (4, "I"), "SIGNED SHORT": (8, "h")}


def check_like_pil(content: bytes, *, turned: bool = True) -> None:
    opened = PIL.Image.open(io.BytesIO(content))
    expected = PIL.ImageOps.exif_transpose(opened)
    ours = read(content, field="image")
    assert np.array_equal(np.asarray(ours), np.asarray(expected.convert("RGB")))
    if turned:
        assert ours.size == noise().size[::-1], "the test proves nothing"


def exif_block(orientation: int, *, order: str = "<", kind: str = "SHORT", others: int = 1) -> bytes:
    """EXIF whose directory has the orientation as a value of `kind`, after `others` entries."""
    code, letter = KINDS[kind]
    entries = [struct.pack(f"{order}HHII", tag, 3, 1, 0) for tag in range(1, others + 1)]
    value = struct.pack(f"{order}{letter}", orientation).ljust(4, b"\0")
    entries.append(struct.pack(f"{order}HHI", Base.Orientation, code, 1) + value)
    head = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + head + struct.pack(f"{order}IH", 8, len(entries)) + b"".join(entries) + bytes(4)


def with_xmp(image_format: str, text: str) -> bytes:
    if image_format != "png":
        return saved(noise(), image_format, xmp=text.encode())
    chunks = PngInfo()
    chunks.add_itxt("XML:com.adobe.xmp", text)
    return saved(noise(), "png", pnginfo=chunks)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_exif_orientation_is_applied(image_format: str, order: str, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif.endian = order
    exif[0x010E] = "a description, which lies elsewhere"
    exif[Base.Orientation] = orientation
    content = saved(noise(), image_format, exif=exif)
    expected = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(content)))
    assert np.array_equal(np.asarray(read(content, field="image")), np.asarray(expected))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_the_orientation_may_be_any_integer(image_format: str, kind: str, order: str) -> None:
    check_like_pil(saved(noise(), image_format, exif=exif_block(6, order=order, kind=kind)))


@pytest.mark.parametrize("written", ['tiff:Orientation="8">', "><tiff:Orientation>6</tiff:Orientation>"])
@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_xmp_orientation_is_applied(image_format: str, written: str) -> None:
    check_like_pil(with_xmp(image_format, XMP % written))


def test_exif_comes_before_xmp() -> None:
    upright = XMP % 'tiff:Orientation="1">'
    check_like_pil(saved(noise(), "jpeg", exif=exif_block(6), xmp=upright.encode()))


def test_exif_in_a_text_chunk_is_applied() -> None:
    """As ImageMagick wrote it before PNG had eXIf."""
    chunks = PngInfo()
    block = exif_block(6)
    chunks.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n")
    check_like_pil(saved(noise(), "png", pnginfo=chunks))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_invalid_orientation_is_ignored(orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[Base.Orientation] = orientation
    assert read(saved(noise(), exif=exif), field="image").size == noise().size


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of EXIF that is not what it should be
@given(exif=st.binary(max_size=80) | st.builds(bytes.__add__, st.sampled_from([b"II*\0", b"MM\0*"]), st.binary()))
@settings(deadline=None, derandomize=True, database=None)
def test_no_exif_block_causes_an_error(exif: bytes) -> None:
    assert sorted(read(saved(noise(), exif=exif), field="image").size) == sorted(noise().size)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_values_that_overlap_are_not_copied_for_each_tag() -> None:
    """5,000 tags of 60 kB each, all of the same bytes, would be 300 MB."""
    size = 60_000
    entries = b"".join(struct.pack("<HHII", tag, 7, size, 8) for tag in range(5000))
    block = b"II*\0" + struct.pack("<IH", 8, 5000) + entries
    file = PIL.Image.Exif()
    file.load(block.ljust(size + 8, b"\0"))
    assert sum(isinstance(value, bytes) and len(value) == size for value in file.values()) <= 1


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_every_exif_block_is_read_as_pil_reads_it(data: st.DataObject) -> None:
    block: Any = bytearray(exif_block(data.draw(st.integers(0, 9)), order=data.draw(st.sampled_from("<>"))))
    for _ in range(data.draw(st.integers(0, 3))):
        block[data.draw(st.integers(6, len(block) - 1))] = data.draw(st.integers(0, 255))
    content = saved(noise(), "png", exif=bytes(block))
    try:
        check_like_pil(content, turned=False)
    except (SyntaxError, struct.error):  # PIL's own: here the image stays as it is
        assert read(content, field="image").size == noise().size
