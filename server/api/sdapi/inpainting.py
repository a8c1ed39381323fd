"""The image and the mask of img2img: fitted to the model, and the result put back into the image that was sent.

As in the web UI, what the mask does not cover keeps the pixels that were sent, and `mask_blur` softens the seam.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import PIL.Image
from PIL import ImageFilter, ImageOps

from engines.manifest import Manifest, Size
from server.api.sdapi import pixels
from server.api.sdapi.errors import rejected
from server.api.sdapi.translation.schemas import Img2Img
from server.requests import uploads
from server.requests.params import Image
from server.requests.request import Completed

_MOST_PIXELS = 4 * uploads.MAX_PIXELS  # of all the images of a reply
_STRENGTH = 0.75
_BLUR = 4  # pixels
_LANCZOS = PIL.Image.Resampling.LANCZOS


@dataclass(frozen=True, slots=True)
class Canvas:
    """An uploaded image and its mask. `prepare` and `paste` decode them: call those off the event loop."""

    body: Img2Img
    size: Size
    images: int

    @classmethod
    def of(cls, body: Img2Img, manifest: Manifest, *, images: int) -> Canvas:
        """The canvas of `images` images."""
        default = manifest.resolutions[0]
        return cls(body, Size(width=body.width or default.width, height=body.height or default.height), images)

    def prepare(self) -> dict[str, Any]:
        """The fields of a request to latentd's own API. Raises InvalidRequest."""
        image, mask = self._files()
        strength = self.body.denoising_strength
        return {
            "width": self.size.width,
            "height": self.size.height,
            "image": image,
            "mask": mask,
            "strength": _STRENGTH if strength is None else strength,
        }

    def paste(self, completed: Completed) -> Completed:
        """The images, put into the one that was sent where there is a mask."""
        if self.body.mask is None:
            return completed
        image = self._image()
        mask = self._mask(image, self.body.mask)
        paste = partial(self._paste_area if self._crops else self._paste_whole, image, mask)
        return replace(completed, images=tuple(map(paste, completed.images)))

    @property
    def _crops(self) -> bool:
        """Whether the masked area alone is made."""
        return self.body.mask is not None and self.body.inpaint_full_res not in (False, 0)

    def _files(self) -> tuple[bytes, bytes | None]:
        """The image and the mask, in the size of the request."""
        body = self.body
        if body.mask is None:
            plain = not body.resize_mode  # as the server fits images by itself
            return body.init_images[0] if plain else pixels.png(self._fit(self._image())), None
        image = self._image()
        mask = self._mask(image, body.mask)
        if self._crops:
            self._check_pixels(image)
            box = self._area(mask)
            image, mask = image.crop(box), mask.crop(box)
        image, mask = self._fit(image), self._fit(mask)
        return pixels.png(image if body.inpainting_fill else pixels.fill(image, mask)), pixels.png(mask)

    def _image(self) -> PIL.Image.Image:
        return pixels.flatten(uploads.read(self.body.init_images[0], field="init_images"))

    def _mask(self, image: PIL.Image.Image, file: bytes) -> PIL.Image.Image:
        """The mask at the size of `image`, blurred."""
        body = self.body
        mask = pixels.greys(uploads.read(file, field="mask")).resize(image.size, _LANCZOS)
        if body.inpainting_mask_invert:
            mask = ImageOps.invert(mask)
        usual = _BLUR if body.mask_blur is None else body.mask_blur
        across = usual if body.mask_blur_x is None else body.mask_blur_x
        down = usual if body.mask_blur_y is None else body.mask_blur_y
        return mask.filter(ImageFilter.GaussianBlur((across, down)))

    def _area(self, mask: PIL.Image.Image) -> pixels.Box:
        """The part of the image that is made: around the mask, in the shape of the size where the image has room."""
        masked = mask.getbbox() or (0, 0, *mask.size)
        padding = self.body.inpaint_full_res_padding or 0
        return pixels.grow(masked, within=mask.size, shape=self.size, padding=padding)

    def _paste_whole(self, image: PIL.Image.Image, mask: PIL.Image.Image, made: Image) -> Image:
        seam = self._fit(mask).point([min(2 * value, 255) for value in range(256)])  # keeps off the masked area
        return pixels.composite(PIL.Image.fromarray(made), self._fit(image), seam)

    def _paste_area(self, image: PIL.Image.Image, mask: PIL.Image.Image, made: Image) -> Image:
        left, upper, right, lower = box = self._area(mask)
        above = image.copy()
        above.paste(PIL.Image.fromarray(made).resize((right - left, lower - upper), _LANCZOS), box)
        return pixels.composite(above, image, mask)

    def _fit(self, image: PIL.Image.Image) -> PIL.Image.Image:
        size = (self.size.width, self.size.height)
        if self._crops or not self.body.resize_mode:
            return image.resize(size, _LANCZOS)
        if self.body.resize_mode == 1:
            return ImageOps.fit(image, size, _LANCZOS)
        return pixels.with_borders(ImageOps.contain(image, size, _LANCZOS), size)

    def _check_pixels(self, image: PIL.Image.Image) -> None:
        total = image.width * image.height * self.images
        if total > _MOST_PIXELS:
            raise rejected(
                "init_images",
                f"{self.images} images of this size have {total} pixels, and {_MOST_PIXELS} are the most: "
                "send a smaller image, ask for fewer, or set inpaint_full_res to false.",
            )
