"""What an image file says of its image: the settings it was made with, and that a model made it.

Nothing in it changes from one run to the next, so that the same request gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Self, get_args

import PIL.Image
from PIL.ExifTags import IFD, Base
from PIL.PngImagePlugin import PngInfo

from server.requests.params import GenerationParams

# Of IPTC's vocabulary: the second is for captured media that a model has changed, as by inpainting.
SourceType = Literal["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]

_VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype"
_XMP_KEYWORD = "XML:com.adobe.xmp"  # of the PNG chunk that holds XMP
_UNICODE = b"UNICODE\0"  # the character code of an EXIF comment, which is then UTF-16
_PACKET = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
   <Iptc4xmpExt:DigitalSourceType>{uri}</Iptc4xmpExt:DigitalSourceType>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


@dataclass(frozen=True, slots=True)
class Metadata:
    """What one file says."""

    parameters: str | None = None  # AUTOMATIC1111's text
    source_type: SourceType | None = None

    @classmethod
    def of_png(cls, image: PIL.Image.Image) -> Self:
        """What a PNG file of ours says."""
        xmp = str(image.info.get(_XMP_KEYWORD, ""))
        source_types = (one for one in get_args(SourceType) if f"/{one}<" in xmp)
        return cls(image.info.get("parameters"), next(source_types, None))

    @property
    def png_options(self) -> dict[str, Any]:
        """The arguments of PIL's `save` that write it into a PNG file."""
        chunks = PngInfo()
        if self.parameters:
            chunks.add_text("parameters", self.parameters)  # iTXt if it is not Latin-1
        if self.source_type:
            chunks.add_itxt(_XMP_KEYWORD, _xmp(self.source_type).decode())
        return {"pnginfo": chunks}

    @property
    def exif_and_xmp(self) -> dict[str, Any]:
        """The arguments of PIL's `save` that write it into a JPEG or WebP file."""
        exif = {"exif": _exif(self.parameters)} if self.parameters else {}
        return exif | ({"xmp": _xmp(self.source_type)} if self.source_type else {})


NO_METADATA = Metadata()


def source_type_of(params: GenerationParams) -> SourceType:
    return "compositeWithTrainedAlgorithmicMedia" if params.init_image else "trainedAlgorithmicMedia"


def source_type_uri(source_type: SourceType) -> str:
    return f"{_VOCABULARY}/{source_type}"


@cache
def _xmp(source_type: SourceType) -> bytes:
    """The XMP packet that states the digital source type."""
    return _PACKET.format(uri=source_type_uri(source_type)).encode()


def _exif(parameters: str) -> bytes:
    """An EXIF block with `parameters` as the comment.

    With prompts of the greatest length it has half of the 64 KiB that a segment of a JPEG file may have.
    """
    exif = PIL.Image.Exif()
    exif.get_ifd(IFD.Exif)[Base.UserComment] = _UNICODE + parameters.encode("utf-16-be")
    return exif.tobytes()
