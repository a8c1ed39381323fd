"""Decode uploaded image files, which are treated as hostile, to pixels."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import PIL.Image
import PIL.TiffImagePlugin  # which the first EXIF would import
from numpy.typing import NDArray
from PIL.ExifTags import IFD, Base
from PIL.ImageFile import ImageFile
from PIL.ImageOps import exif_transpose
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from engines.manifest import Size
from server.requests.errors import FieldError, InvalidRequest
from server.requests.jpeg import too_many_scans

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
# The exceptions that PIL raises on damaged files.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, struct.error)
_TOO_LARGE = f"The image is too large: send at most {MAX_SIDE} pixels per side and {MAX_PIXELS} in total."

# Of what a hostile file has in its EXIF: one line of the log for each text, and the text is the caller's.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


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
    try:
        file = _open(content, field)
        if reason := _rejection(file, content):
            raise _refuse(field, reason)
        return _upright(_plain(file), file)
    except PIL.Image.DecompressionBombError:
        raise _refuse(field, _TOO_LARGE) from None
    except _DAMAGED as error:
        raise _refuse(field, "The file is damaged or truncated: send the complete file.") from error


def read_texts(content: bytes, *, field: str) -> dict[str, str]:
    """The texts in the header of an image file: PNG's by keyword, and what EXIF has as UserComment as `parameters`.

    Pixels are not decoded. Raises InvalidRequest, as `read` does.
    """
    try:
        file = _open(content, field)
        texts = {key: value for key, value in file.info.items() if isinstance(key, str) and isinstance(value, str)}
        comment = file.getexif().get_ifd(IFD.Exif).get(Base.UserComment)
    except PIL.Image.DecompressionBombError:
        raise _refuse(field, _TOO_LARGE) from None
    except _DAMAGED as error:
        raise _refuse(field, "The file is damaged or truncated: send the complete file.") from error
    return texts | ({"parameters": _comment(comment)} if isinstance(comment, bytes) else {})


def fit(image: PIL.Image.Image, size: Size) -> NDArray[np.uint8]:
    """Resize to [H, W, 3] pixels at `size`, as diffusers' `VaeImageProcessor` does.

    The aspect ratio is not kept; transparent pixels become white.
    """
    if image.mode == "RGBA":
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return np.asarray(_resize(image.convert("RGB"), size))


def fit_mask(image: PIL.Image.Image, size: Size) -> NDArray[np.uint8]:
    """Resize to a mask [H, W] at `size`, 1 where the image is regenerated, as in diffusers' inpainting.

    Bright pixels are regenerated, dark ones are kept, and transparency is ignored.
    """
    brightness = np.asarray(_resize(image.convert("RGB"), size).convert("L"))
    return (brightness >= 128).astype(np.uint8)


def over_latents(mask: NDArray[np.uint8], *, downscale: int) -> NDArray[np.float32]:
    """A mask [H, W] as one [h, w] over the latents.

    The first pixel of each block of `downscale` x `downscale` pixels decides; the sides are multiples of `downscale`.
    """
    return mask[::downscale, ::downscale].astype(np.float32)


def transparent_area(image: PIL.Image.Image) -> PIL.Image.Image | None:
    """The fully transparent pixels of `image` in white on black, or None if there are none: the mask of OpenAI's edits.

    Such a mask is the image with a hole in it, so its colours mean nothing.
    """
    if image.mode != "RGBA" or image.getchannel("A").getextrema()[0] != 0:
        return None
    return image.getchannel("A").point([255] + [0] * 255)


def _refuse(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {message}", fields=(FieldError(field, message),))


def _open(content: bytes, field: str) -> ImageFile:
    """The file, of which only the header is read. Raises InvalidRequest, and what PIL raises on damaged files."""
    if len(content) > MAX_FILE:
        raise _refuse(field, f"The file is too large: send at most {MAX_FILE} bytes.")
    reader = next((reader for name, start, reader in _READERS if content.startswith(name, start)), None)
    if reader is None:
        raise _refuse(field, "The file format is not supported: send PNG, JPEG or WebP.")
    return reader(_Bytes(content))  # PIL.Image.open would also warn about large images


def _comment(content: bytes) -> str:
    """An EXIF UserComment: a character code of eight bytes, and text."""
    code, text = content[:8], content[8:]
    if not code.startswith(b"UNICODE"):
        return text.decode(errors="replace").strip("\0")
    return text.decode("utf-16-le" if text[1:2] == b"\0" else "utf-16-be", errors="replace").strip("\0")


def _rejection(file: ImageFile, content: bytes) -> str | None:
    """Why `file`, of which only the header has been read, must not be decoded; None if it may be."""
    width, height = file.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        return _TOO_LARGE
    if getattr(file, "n_frames", 1) != 1:
        return "The file is an animation: send a single image."
    if isinstance(file, JpegImageFile) and too_many_scans(content, MAX_SCANS):
        return f"The JPEG file has more than {MAX_SCANS} scans: save it as a baseline JPEG, or as PNG."
    return None


def _plain(file: ImageFile) -> PIL.Image.Image:
    """Decode `file` from any colour mode."""
    file.load()
    if file.mode.startswith("I"):
        return _of_16_bits(np.asarray(file), file.info.get("transparency"))
    transparent = file.mode in ("LA", "RGBA") or "transparency" in file.info
    return file.convert("RGBA" if transparent else "RGB")


def _of_16_bits(greys: NDArray[np.uint16], transparent: object) -> PIL.Image.Image:
    """The upper eight bits of 16-bit greyscale, where PIL would show all but the darkest as white."""
    image = PIL.Image.fromarray((greys >> 8).astype(np.uint8))
    if not isinstance(transparent, int):
        return image.convert("RGB")
    image.putalpha(PIL.Image.fromarray(np.where(greys == transparent, 0, 255).astype(np.uint8)))
    return image.convert("RGBA")


def _upright(image: PIL.Image.Image, file: ImageFile) -> PIL.Image.Image:
    """`image` as the EXIF or XMP of its `file` says; what cannot be read says nothing."""
    try:
        orientation = file.getexif().get(Base.Orientation)
    except _DAMAGED:
        return image
    if orientation is None or orientation not in range(2, 9):
        return image
    only = PIL.Image.Exif()  # PIL would write every other tag of the file's again, and fail at some
    only[Base.Orientation] = int(orientation)
    image.info = {"exif": only.tobytes()}
    return exif_transpose(image)


def _resize(image: PIL.Image.Image, size: Size) -> PIL.Image.Image:
    return image.resize((size.width, size.height), PIL.Image.Resampling.LANCZOS)
