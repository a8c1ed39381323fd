"""Files to pixels: pictures that callers send, read as if each meant harm."""

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
MAX_SCANS = 64  # of a JPEG file; ten are usual, and each costs as much time as it has pixels, and hardly a byte
MAX_READS = 20_000  # of one file: a sound one takes three for each of its blocks, which have kilobytes

_READERS: tuple[tuple[bytes, int, type[ImageFile]], ...] = (  # what a file says it is, at which byte, and who reads it
    (b"\x89PNG\r\n\x1a\n", 0, PngImageFile),
    (b"\xff\xd8\xff", 0, JpegImageFile),
    (b"WEBP", 8, WebPImageFile),
)
_START_OF_SCAN = b"\xff\xda"  # among a JPEG file's pixels no other marker looks like it
# What PIL raises on a file that is not what it should be, and what it takes for a sign of one.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, struct.error)
_TOO_LARGE = f"The picture is too large: send at most {MAX_SIDE} pixels a side, and {MAX_PIXELS} in all."

_ORIENTATION = 0x0112  # tag of EXIF
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_UPRIGHT = {  # what undoes each orientation; 1 is upright
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


class _Bytes(io.BytesIO):
    """A file that ends when it is read in crumbs: a million empty blocks would keep PIL busy for half a minute."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise OSError("too many blocks")
        return super().read(size)


def read(content: bytes, *, field: str) -> PIL.Image.Image:
    """The picture in a PNG, JPEG or WebP file, upright: RGBA where some of it may be transparent, else RGB.

    Nothing is decoded before the file's size and its header are within bounds. It may still take a second or two,
    and 200 MB: call it off the event loop, not too often at once.

    Raises:
        InvalidRequest: the file in `field` is no such picture, is damaged, or exceeds a bound.
    """
    if len(content) > MAX_FILE:
        raise _refuse(field, f"The file is too large: send at most {MAX_FILE} bytes.")
    reader = next((reader for name, start, reader in _READERS if content.startswith(name, start)), None)
    if reader is None:
        raise _refuse(field, "The file is no picture that is read here: send PNG, JPEG or WebP.")
    try:
        file = reader(_Bytes(content))  # reads the header; PIL.Image.open would also warn, of large ones
        if trouble := _trouble(file, content):
            raise _refuse(field, trouble)
        return _upright(_plain(file), file.info.get("exif", b""))
    except PIL.Image.DecompressionBombError:
        raise _refuse(field, _TOO_LARGE) from None
    except _DAMAGED as error:
        raise _refuse(field, "The file is damaged or cut short: send the whole of it.") from error


def fit(picture: PIL.Image.Image, size: Size) -> NDArray[np.uint8]:
    """The pixels [H, W, 3] of `picture` at `size`, as diffusers' `VaeImageProcessor` resizes them.

    The proportions give way, and what is transparent becomes white.
    """
    if picture.mode == "RGBA":
        picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(_resize(picture.convert("RGB"), size))


def fit_mask(picture: PIL.Image.Image, size: Size, *, downscale: int) -> NDArray[np.float32]:
    """A mask [h, w] over latents, 1 where the picture is drawn anew, as diffusers' inpainting pipelines make it.

    Bright pixels are drawn anew, dark ones stay, and transparency has no say. Of each `downscale` x `downscale`
    pixels, which `size` is a multiple of, the first decides.
    """
    brightness = np.asarray(_resize(picture.convert("RGB"), size).convert("L"))
    return (brightness[::downscale, ::downscale] >= 128).astype(np.float32)


def _refuse(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {message}", fields=(FieldError(field, message),))


def _trouble(file: ImageFile, content: bytes) -> str | None:
    """What forbids to decode `file`, of which no more than the header was read."""
    width, height = file.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        return _TOO_LARGE
    if getattr(file, "n_frames", 1) != 1:
        return "The file is an animation: send a single picture."
    if isinstance(file, JpegImageFile) and content.count(_START_OF_SCAN) > MAX_SCANS:
        return f"The JPEG file has more than {MAX_SCANS} scans: save it as a baseline JPEG, or as PNG."
    return None


def _plain(file: ImageFile) -> PIL.Image.Image:
    """Decode `file`, whatever its colours are stored as."""
    file.load()
    if file.mode.startswith("I"):  # 16 bits of grey, of which PIL would keep the wrong ones
        return PIL.Image.fromarray((np.asarray(file) >> 8).astype(np.uint8)).convert("RGB")
    transparent = file.mode in ("LA", "RGBA") or "transparency" in file.info
    return file.convert("RGBA" if transparent else "RGB")


def _upright(picture: PIL.Image.Image, exif: bytes) -> PIL.Image.Image:
    transposition = _UPRIGHT.get(_orientation(exif))
    return picture if transposition is None else picture.transpose(transposition)


def _orientation(exif: bytes) -> int:
    """The orientation that a block of EXIF gives, or 0; EXIF 2.3, section 4.6.4, in a directory as of TIFF 6.0.

    PIL's `exif_transpose` would read, judge and write anew every other tag on the way.
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
    except struct.error:  # cut short
        pass
    return 0


def _resize(picture: PIL.Image.Image, size: Size) -> PIL.Image.Image:
    return picture.resize((size.width, size.height), PIL.Image.Resampling.LANCZOS)
