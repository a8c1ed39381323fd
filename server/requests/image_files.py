"""Image files as callers get them: encoded, with the metadata that the server's settings ask for."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import PIL.Image

from server.requests import images, infotext
from server.requests.images import ImageFormat
from server.requests.metadata import Metadata, SourceType, source_type_of
from server.requests.params import GenerationParams, Image

Sign = Callable[[bytes, ImageFormat, SourceType], bytes]  # from a file to a signed one


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Makes files of images. For any thread."""

    embed_parameters: bool = True
    mark_ai: bool = True
    sign: Sign | None = None

    def make(
        self,
        image: Image,
        seed: int,
        *,
        params: GenerationParams,
        model: str,
        image_format: ImageFormat,
        quality: int | None = None,
    ) -> bytes:
        """The file of the image of `params` with `seed`; for `quality` see `images.encode`."""
        source_type = source_type_of(params)
        metadata = Metadata(
            infotext.write(params, seed=seed, model=model) if self.embed_parameters else None,
            source_type if self.mark_ai else None,
        )
        file = images.encode(image, image_format, quality=quality, metadata=metadata)
        return self.sign(file, image_format, source_type) if self.sign else file

    def transcode(self, png: bytes, image_format: ImageFormat) -> bytes:
        """A PNG file that `make` made in another format, with the same metadata."""
        if image_format == "png":
            return png
        with PIL.Image.open(io.BytesIO(png)) as image:
            metadata = Metadata.of_png(image)
            file = images.encode(np.asarray(image), image_format, metadata=metadata)
        if self.sign and metadata.source_type:
            return self.sign(file, image_format, metadata.source_type)
        return file
