"""Decode uploaded image files, which are treated as hostile, to pixels."""

from __future__ import annotations

import io
import struct

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from engines.manifest import Size
from server.requests.errors import FieldError, InvalidRequest

MAX_FILE = 12 * 1024 * 1024  # bytes
MAX_PIXELS = 16_777_216
MAX_SIDE = 16_384  # pixels
MAX_SCANS = 64  # of a JPEG file; ten are usual. A scan of few bytes costs time proportional to the pixels
MAX_READS = 20_000  # read calls per file; a valid file needs three per block of kilobytes

_READERS: tuple[tuple[bytes, int, type[ImageFile]], ...] = (  # signature, its offset, and the reader
    (b"\x89PNG\r\n\x1a\n", 0, PngImageFile),
    (b"\xff\xd8\xff", 0, JpegImageFile),
    (b"WEBP", 8, WebPImageFile),
)
_START_OF_SCAN = b"\xff\xda"  # cannot occur within the pixel data of a JPEG file
# The exceptions that PIL raises on damaged files.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, struct.error)
_TOO_LARGE = f"The image is too large: send at most {MAX_SIDE} pixels per side and {MAX_PIXELS} in total."

_ORIENTATION = 0x0112  # EXIF tag
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_UPRIGHT = {  # the transposition that undoes each orientation; 1 is upright
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


class _Bytes(io.BytesIO):
    """A file with a limit on read calls: a million empty blocks would keep PIL busy for half a minute."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise OSError("too many blocks")
        return super().read(size)


def read(content: bytes, *, field: str) -> PIL.Image.Image:
    """Decode a PNG, JPEG or WebP file, upright: RGBA if it may have transparent pixels, otherwise RGB.

    Nothing is decoded before the file size and the header are within bounds. Decoding may still take one or two seconds
    and 200 MB: call it off the event loop, with limited concurrency.

    Raises:
        InvalidRequest: the file in `field` is not a supported image, is damaged, or exceeds a limit.
    """
    if len(content) > MAX_FILE:
        raise _refuse(field, f"The file is too large: send at most {MAX_FILE} bytes.")
    reader = next((reader for name, start, reader in _READERS if content.startswith(name, start)), None)
    if reader is None:
        raise _refuse(field, "The file format is not supported: send PNG, JPEG or WebP.")
    try:
        file = reader(_Bytes(content))  # reads the header; PIL.Image.open would also warn about large images
        if reason := _rejection(file, content):
            raise _refuse(field, reason)
        return _upright(_plain(file), file.info.get("exif", b""))
    except PIL.Image.DecompressionBombError:
        raise _refuse(field, _TOO_LARGE) from None
    except _DAMAGED as error:
        raise _refuse(field, "The file is damaged or truncated: send the complete file.") from error


def fit(image: PIL.Image.Image, size: Size) -> NDArray[np.uint8]:
    """Resize to [H, W, 3] pixels at `size`, as diffusers' `VaeImageProcessor` does.

    The aspect ratio is not kept; transparent pixels become white.
    """
    if image.mode == "RGBA":
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return np.asarray(_resize(image.convert("RGB"), size))


def fit_mask(image: PIL.Image.Image, size: Size, *, downscale: int) -> NDArray[np.float32]:
    """Resize to a mask [h, w] over the latents, 1 where the image is regenerated, as in diffusers' inpainting.

    Bright pixels are regenerated, dark ones are kept, and transparency is ignored. The first pixel of each block of
    `downscale` x `downscale` pixels decides; `size` is a multiple of `downscale`.
    """
    brightness = np.asarray(_resize(image.convert("RGB"), size).convert("L"))
    return (brightness[::downscale, ::downscale] >= 128).astype(np.float32)


def _refuse(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {message}", fields=(FieldError(field, message),))


def _rejection(file: ImageFile, content: bytes) -> str | None:
    """Why `file`, of which only the header has been read, must not be decoded; None if it may be."""
    width, height = file.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        return _TOO_LARGE
    if getattr(file, "n_frames", 1) != 1:
        return "The file is an animation: send a single image."
    if isinstance(file, JpegImageFile) and content.count(_START_OF_SCAN) > MAX_SCANS:
        return f"The JPEG file has more than {MAX_SCANS} scans: save it as a baseline JPEG, or as PNG."
    return None


def _plain(file: ImageFile) -> PIL.Image.Image:
    """Decode `file` from any colour mode."""
    file.load()
    if file.mode.startswith("I"):  # 16-bit greyscale, of which PIL would keep the wrong bits
        return PIL.Image.fromarray((np.asarray(file) >> 8).astype(np.uint8)).convert("RGB")
    transparent = file.mode in ("LA", "RGBA") or "transparency" in file.info
    return file.convert("RGBA" if transparent else "RGB")


def _upright(image: PIL.Image.Image, exif: bytes) -> PIL.Image.Image:
    transposition = _UPRIGHT.get(_orientation(exif))
    return image if transposition is None else image.transpose(transposition)


def _orientation(exif: bytes) -> int:
    """The orientation in an EXIF block, or 0 (EXIF 2.3, section 4.6.4; the directory format is TIFF 6.0).

    PIL's `exif_transpose` would parse and rewrite every other tag as well.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = _BYTE_ORDERS.get(tiff[:4])
    if order is None:
        return 0
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for index in range(entries):
            tag, _kind, _count, value = struct.unpack_from(f"{order}HHIH", tiff, directory + 2 + 12 * index)
            if tag == _ORIENTATION:
                return int(value)
    except struct.error:  # truncated
        pass
    return 0


def _resize(image: PIL.Image.Image, size: Size) -> PIL.Image.Image:
    return image.resize((size.width, size.height), PIL.Image.Resampling.LANCZOS)
