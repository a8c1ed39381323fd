"""What a request starts from, by its uploaded files: the initial image, and the mask of what is repainted."""

from __future__ import annotations

import numpy as np
import PIL.Image

from engines.manifest import Manifest, Size
from server.requests import uploads
from server.requests.params import Image, InitImage, MaskedImage, PixelMask
from server.requests.schemas import GenerateRequest

_STRENGTH = 0.8  # of image to image, as in diffusers
_BY_TRANSPARENCY = (
    "mask: Its transparent areas are regenerated and its colours are ignored: send it without transparency to have its "
    "white areas regenerated."
)


def start_of(
    body: GenerateRequest, image: PIL.Image.Image | None, size: Size, manifest: Manifest
) -> tuple[InitImage | None, MaskedImage | None]:
    """The initial image, and for models that inpaint what their UNet sees of it.

    Without a mask such models repaint everything. Raises InvalidRequest.
    """
    original = None if image is None else uploads.fit(image, size)
    pixels, warnings = (None, ()) if body.mask is None else _read_mask(body.mask, size, manifest.latent.downscale)
    masked = _masked(original, pixels, size, manifest.latent.downscale) if manifest.is_for_inpainting else None
    if original is None:
        return None, masked
    usual = _STRENGTH if pixels is None else manifest.mask_strength
    strength = usual if body.strength is None else body.strength
    if masked:
        return InitImage(original, strength, masked.mask, warnings), masked
    mask = None if pixels is None else uploads.over_latents(pixels, downscale=manifest.latent.downscale)
    return InitImage(original, strength, mask, warnings), None


def _masked(image: Image | None, pixels: PixelMask | None, size: Size, downscale: int) -> MaskedImage:
    everywhere = np.ones((size.height, size.width), np.uint8)
    pixels = everywhere if pixels is None else pixels
    blank = np.zeros((*everywhere.shape, 3), np.uint8)
    return MaskedImage(blank if image is None else image, pixels, uploads.over_latents(pixels, downscale=downscale))


def _read_mask(file: bytes, size: Size, downscale: int) -> tuple[PixelMask, tuple[str, ...]]:
    """The mask, and a warning if it is read by its transparency although its colours are another mask."""
    image = uploads.read(file, field="mask")
    by_colours, area = uploads.fit_mask(image, size), uploads.transparent_area(image)
    if area is None:
        return by_colours, ()
    mask = uploads.fit_mask(area, size)
    same = uploads.over_latents(mask, downscale=downscale) == uploads.over_latents(by_colours, downscale=downscale)
    return mask, () if same.all() else (_BY_TRANSPARENCY,)
