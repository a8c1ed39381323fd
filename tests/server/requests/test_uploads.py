"""Uploaded images are prepared as in diffusers, or rejected before they can do harm."""

from __future__ import annotations

import io
import random
import struct
import time
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL.ImageFile import ImageFile
from PIL.WebPImagePlugin import WebPImageFile

from engines.manifest import Size
from server.requests.errors import InvalidRequest
from server.requests.uploads import MAX_FILE, MAX_SCANS, fit, fit_mask, over_latents, read
from tests.support.image_files import chunk, noise, png, saved

DOWNSCALE = 8
SIZES = [Size(width=48, height=32), Size(width=32, height=64), Size(width=56, height=40)]
ORIENTATION = 0x0112

# What a picture processor of diffusers' image to image and inpainting pipelines is made with.
image_processor = VaeImageProcessor(vae_scale_factor=DOWNSCALE)
mask_processor = VaeImageProcessor(
    vae_scale_factor=DOWNSCALE, do_normalize=False, do_binarize=True, do_convert_grayscale=True
)


def jpeg_header(width: int, height: int) -> bytes:
    frame = struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0"
    return b"\xff\xd8\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame + b"\xff\xda\0\x08\1\1\0\0\x3f\0"


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(content)) + content for kind, content in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_header(width: int, height: int) -> bytes:
    """A canvas of this size, which the decoder would lay out for an animation of one frame of one pixel."""
    pool = b"\2\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    pixel = saved(PIL.Image.new("RGB", (1, 1)), "webp", lossless=True)[12:]
    return webp((b"VP8X", pool), (b"ANIM", bytes(6)), (b"ANMF", bytes(16) + pixel))


def refusal(content: bytes) -> str:
    """What is said of a file that is refused."""
    with pytest.raises(InvalidRequest) as refused:
        read(content, field="image")
    (error,) = refused.value.fields
    assert error.field == "image"
    assert refused.value.detail == f"image: {error.message}"
    return error.message


OPAQUE = {
    "RGB": saved(noise()),
    "grey": saved(noise().convert("L")),
    "black and white": saved(noise().convert("1")),
    "palette": saved(noise().convert("P")),
    "JPEG": saved(noise(), "jpeg"),
    "progressive JPEG": saved(noise(), "jpeg", progressive=True),
    "grey JPEG": saved(noise().convert("L"), "jpeg"),
    "CMYK JPEG": saved(noise().convert("CMYK"), "jpeg"),
    "WebP": saved(noise(), "webp"),
    "lossless WebP": saved(noise(), "webp", lossless=True),
    "opaque RGBA": saved(noise().convert("RGBA")),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("content", OPAQUE.values(), ids=OPAQUE)
def test_an_image_is_prepared_as_in_diffusers(content: bytes, size: Size) -> None:
    theirs = PIL.Image.open(io.BytesIO(content)).convert("RGB")
    expected = image_processor.preprocess(theirs, height=size.height, width=size.width)
    pixels = fit(read(content, field="image"), size)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (size.height, size.width, 3)
    ours = 2.0 * (torch.from_numpy(pixels.astype(np.float32) / 255.0).permute(2, 0, 1)[None]) - 1.0
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("content", OPAQUE.values(), ids=OPAQUE)
def test_a_mask_is_prepared_as_in_diffusers(content: bytes, size: Size) -> None:
    theirs = PIL.Image.open(io.BytesIO(content)).convert("RGB")
    full = mask_processor.preprocess(theirs, height=size.height, width=size.width)
    grid = (size.height // DOWNSCALE, size.width // DOWNSCALE)
    expected = torch.nn.functional.interpolate(full, size=grid)
    ours = over_latents(fit_mask(read(content, field="mask"), size), downscale=DOWNSCALE)
    assert ours.dtype == np.float32
    assert torch.equal(torch.from_numpy(ours), expected[0, 0])
    assert set(np.unique(ours)) <= {0.0, 1.0}


TRANSPARENT = {
    "RGBA": saved(PIL.Image.new("RGBA", (8, 8), (255, 0, 0, 0))),
    "grey and alpha": saved(PIL.Image.new("LA", (8, 8), (0, 0))),
    "palette with alphas": saved(noise().convert("P"), transparency=bytes(256)),
    "one palette entry": saved(PIL.Image.new("P", (8, 8), 0), transparency=0),
    "one colour": saved(PIL.Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3)),
    "one grey": saved(PIL.Image.new("L", (8, 8), 9), transparency=9),
    "WebP": saved(PIL.Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "webp", lossless=True, exact=True),
}


@pytest.mark.parametrize("content", TRANSPARENT.values(), ids=TRANSPARENT)
def test_transparent_pixels_become_white(content: bytes) -> None:
    picture = read(content, field="image")
    assert picture.mode == "RGBA"
    assert (fit(picture, Size(width=16, height=16)) == 255).all()


def test_half_transparent_pixels_become_half_white() -> None:
    content = saved(PIL.Image.new("RGBA", (8, 8), (200, 100, 0, 128)))
    pixels = fit(read(content, field="image"), Size(width=8, height=8)).astype(int)
    assert np.abs(pixels - [227, 177, 127]).max() <= 1


def test_of_sixteen_bits_the_upper_eight_are_kept() -> None:
    values = np.array([[0, 255, 256, 0x80FF, 0xFFFF]], np.uint16)
    picture = read(saved(PIL.Image.fromarray(values)), field="image")
    assert np.asarray(picture.convert("L")).tolist() == [[0, 0, 1, 0x80, 0xFF]]
    half = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">2H", 0x1234, 0x8000)))
    clear = png(2, 1, chunk(b"tRNS", b"\x12\x34"), half, depth=16, colours=0)
    assert np.asarray(read(clear, field="image")).tolist() == [[[0x12] * 3 + [0], [0x80] * 3 + [255]]]
    colours = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">3H", 0x10FF, 0x20FF, 0x30FF)))
    assert read(png(1, 1, colours, depth=16), field="image").getpixel((0, 0)) == (0x10, 0x20, 0x30)


HEADERS = {"PNG": (png, 30_000), "JPEG": (jpeg_header, 30_000), "WebP": (webp_header, 30_000)}
NEARLY = {"PNG": (png, 16_384), "JPEG": (jpeg_header, 16_384), "WebP": (webp_header, 13_000)}  # PIL alone would decode


@pytest.fixture
def _undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_file: ImageFile) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile, "load", load)
    monkeypatch.setattr(WebPImageFile, "load", load)


@pytest.mark.usefixtures("_undecoded")
@pytest.mark.parametrize(("header", "side"), [*HEADERS.values(), *NEARLY.values()], ids=[*HEADERS, *NEARLY])
def test_too_many_pixels_are_rejected_before_decoding(header: Any, side: int) -> None:
    pixels = (chunk(b"IDAT", b""),) if header is png else ()
    assert "16384 pixels per side" in refusal(header(side, side, *pixels))


@pytest.mark.usefixtures("_undecoded")
def test_an_extreme_aspect_ratio_is_rejected_before_decoding() -> None:
    assert "16384 pixels per side" in refusal(png(16_385, 1, chunk(b"IDAT", b"")))
    assert "16384 pixels per side" in refusal(png(1, 16_385, chunk(b"IDAT", b"")))


@pytest.mark.usefixtures("_undecoded")
@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_an_animation_is_rejected_before_decoding(image_format: str) -> None:
    content = saved(noise(), image_format, save_all=True, append_images=[noise().rotate(90)])
    assert "animation" in refusal(content)


@pytest.mark.usefixtures("_undecoded")
def test_a_large_file_is_rejected_before_decoding() -> None:
    assert str(MAX_FILE) in refusal(saved(noise()).ljust(MAX_FILE + 1, b"\0"))


@pytest.mark.usefixtures("_undecoded")
def test_a_jpeg_of_many_scans_is_rejected_before_decoding() -> None:
    """Each scan costs some tens of bytes, and as much time as the picture has pixels."""
    content = saved(PIL.Image.new("L", (4096, 4096), 128), "jpeg", progressive=True)
    scan = content[content.rfind(b"\xff\xda") : -2]
    assert "scans" in refusal(content[:-2] + scan * MAX_SCANS + content[-2:])


def test_a_file_at_the_limits_is_accepted() -> None:
    content = saved(noise()).ljust(MAX_FILE, b"\0")
    assert read(content, field="image").size == noise().size
    assert read(saved(PIL.Image.new("1", (16_384, 1024))), field="image").size == (16_384, 1024)


CRUMBS = {
    "PNG blocks": png(1, 1, chunk(b"prVt", b"") * 900_000),
    "PNG pixels": png(1, 1, chunk(b"IDAT", b"") * 900_000),
    "JPEG EXIF": b"\xff\xd8" + b"\xff\xe1\0\x0aExif\0\0ab" * 1_000_000,
    "JPEG fill": b"\xff\xd8" + b"\xff" * MAX_FILE,
    "JPEG junk": b"\xff\xd8\xff\xe0\0\2" + bytes(MAX_FILE),
}


@pytest.mark.parametrize("content", CRUMBS.values(), ids=CRUMBS)
def test_a_file_of_tiny_blocks_is_rejected_early(content: bytes) -> None:
    assert "damaged" in refusal(content[:MAX_FILE])


OTHER_KINDS = {
    "GIF": saved(noise(), "gif"),
    "BMP": saved(noise(), "bmp"),
    "TIFF": saved(noise(), "tiff"),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "ICO": saved(noise(), "ico"),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "PDF": b"%PDF-1.7\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    "AVIF": b"\0\0\0\x1cftypavif",
    "WAV": b"RIFF\x24\0\0\0WAVEfmt ",
    "text": b"a red cat",
    "nothing": b"",
}


@pytest.mark.parametrize("content", OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_an_unsupported_format_lists_the_supported_ones(content: bytes) -> None:
    assert "send PNG, JPEG or WebP" in refusal(content)


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_rejected(image_format: str, kept: float) -> None:
    content = saved(noise(), image_format)
    assert "damaged or truncated" in refusal(content[: int(len(content) * kept)])


DAMAGED = {
    "a PNG without pixels": png(8, 8),
    "a PNG of no size": png(0, 0, chunk(b"IDAT", zlib.compress(b""))),
    "fewer pixels than promised": png(64, 64, chunk(b"IDAT", zlib.compress(bytes(25 * 9)))),
    "pixels that are not compressed": png(8, 8, chunk(b"IDAT", bytes(25 * 8))),
    "an unknown colour type": png(8, 8, chunk(b"IDAT", zlib.compress(bytes(25 * 8))), colours=7),
    "a wrong checksum": saved(noise())[:-20] + bytes(20),
    "a PNG that says it is a JPEG": b"\xff\xd8\xff" + saved(noise()),
    "a text that swells": png(1, 1, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2_000_000)))),
    "a text in place of a transparency": png(
        8, 8, chunk(b"tEXt", b"transparency\0x"), chunk(b"IDAT", zlib.compress(bytes(25 * 8)))
    ),
    "a JPEG of twelve bits": jpeg_header(8, 8).replace(b"\x0b\x08", b"\x0b\x0c", 1),
    "a WebP of nothing": webp((b"VP8 ", b"")),
    "a WebP whose chunk goes on": webp((b"VP8L", b"\x2f\0\0\0\0"))[:-3],
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_rejected(content: bytes) -> None:
    assert "damaged or truncated" in refusal(content)


def test_a_missing_palette_causes_no_server_error() -> None:
    content = png(1, 1, chunk(b"IDAT", zlib.compress(b"\0\0")), colours=3)
    assert read(content, field="image").size == (1, 1)


exif_in_full = PIL.Image.Exif()
exif_in_full[ORIENTATION] = 6
exif_in_full[0x011A] = 72.0
exif_in_full[0x010E] = "a description"
SOUND = [
    *OPAQUE.values(),
    *TRANSPARENT.values(),
    *(saved(noise(9, 7), kind, exif=exif_in_full, icc_profile=bytes(99)) for kind in ("png", "jpeg", "webp")),
    *(saved(noise(9, 7), kind, save_all=True, append_images=[noise(9, 7).rotate(180)]) for kind in ("png", "webp")),
]


def checked(content: bytes) -> bytes:
    """`content` with the right checksums, if it is a PNG: behind them lies what else could go wrong."""
    mended, rest = content[:8], content[8:]
    while content.startswith(b"\x89PNG") and len(rest) >= 12:
        length = int.from_bytes(rest[:4])
        mended += chunk(rest[4:8], rest[8 : 8 + length])
        rest = rest[12 + length :]
    return mended + rest


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of EXIF that is not what it should be
@settings(max_examples=600, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_file_causes_a_server_error(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(SOUND)))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, min(len(content) - 1, 400)))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(min_size=1, max_size=4))
    try:
        picture = read(checked(bytes(content)) if data.draw(st.booleans()) else bytes(content), field="image")
    except InvalidRequest:
        return
    assert picture.mode in ("RGB", "RGBA")
    assert fit(picture, SIZES[0]).shape == (32, 48, 3)
    assert over_latents(fit_mask(picture, SIZES[0]), downscale=8).shape == (4, 6)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("seed", range(4))
def test_no_mutation_anywhere_in_a_file_causes_a_server_error(seed: int) -> None:
    """Flipped, repeated, missing and foreign bytes, and any bytes after a signature."""
    dice = random.Random(seed)
    begin = time.process_time()
    for _ in range(400):
        content = bytearray(dice.choice(SOUND))
        for _ in range(dice.choice((1, 2, 8))):
            at, length = dice.randrange(len(content)), dice.randrange(1, 40)
            other = dice.choice(SOUND)
            spliced = other[dice.randrange(len(other)) :][:length]
            content[at : at + dice.choice((0, 1, length))] = dice.choice((dice.randbytes(1), bytes(length), spliced))
        if dice.random() < 0.1:
            content = bytearray(dice.choice(SOUND)[:16] + dice.randbytes(300))
        with suppress(InvalidRequest):
            fit(read(checked(bytes(content)) if dice.random() < 0.5 else bytes(content), field="image"), SIZES[0])
    assert time.process_time() - begin < 30
