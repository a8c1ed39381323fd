"""What files say of their images, as Pillow reads them."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
from PIL.ExifTags import IFD, Base

from engines.limits import LONGEST_NAME, PROMPT_LENGTH
from engines.manifest import Size
from engines.schedulers import Scheduler
from server.requests.image_files import ImageFiles
from server.requests.images import FORMATS, ImageFormat
from server.requests.params import GenerationParams, Image, InitImage
from server.requests.tokenizer import Prompt

PIXELS: Image = np.full((32, 32, 3), 128, np.uint8)
PARAMS = GenerationParams(
    Prompt("a boat", ()), Prompt("", ()), Size(width=32, height=32), Scheduler("euler"), 20, 7.5, (42,)
)


def make(files: ImageFiles, image_format: ImageFormat, params: GenerationParams = PARAMS, model: str = "sd15") -> bytes:
    return files.make(PIXELS, 42, params=params, model=model, image_format=image_format)


def opened(file: bytes) -> PIL.Image.Image:
    picture = PIL.Image.open(io.BytesIO(file))
    picture.load()
    return picture


def parameters(picture: PIL.Image.Image) -> str | None:
    if picture.format == "PNG":
        text: str | None = picture.info.get("parameters")
        return text
    comment: bytes = picture.getexif().get_ifd(IFD.Exif).get(Base.UserComment, b"")
    assert not comment or comment.startswith(b"UNICODE\0")
    return comment[8:].decode("utf-16-be") or None


def source_type(picture: PIL.Image.Image) -> str | None:
    found = picture.getxmp()
    uri = found["xmpmeta"]["RDF"]["Description"]["DigitalSourceType"] if found else None
    return uri and str(uri)


def prompted(prompt: str, negative_prompt: str = "") -> GenerationParams:
    return replace(PARAMS, prompt=Prompt(prompt, ()), negative_prompt=Prompt(negative_prompt, ()))


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize(
    "prompt", ["a boat", "café, naïve: (red:1.2)", "a boat\non a hill", "日本の舟 🚣", "\x85\xa0é"]
)
def test_a_file_has_its_parameters(image_format: ImageFormat, prompt: str) -> None:
    text = parameters(opened(make(ImageFiles(), image_format, prompted(prompt))))
    assert text
    assert text.startswith(f"{prompt.strip()}\nSteps: 20, Sampler: Euler, ")


@pytest.mark.parametrize(("prompt", "chunk"), [("café", b"tEXtparameters\0"), ("日本", b"iTXtparameters\0")])
def test_a_png_file_has_the_chunk_that_its_text_needs(prompt: str, chunk: bytes) -> None:
    file = make(ImageFiles(), "png", prompted(prompt))
    assert chunk in file
    assert file.index(chunk) < file.index(b"IDAT"), "readers that stop at the pixels would not see it"


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_file_says_that_a_model_made_it(image_format: ImageFormat) -> None:
    picture = opened(make(ImageFiles(), image_format))
    assert source_type(picture) == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    changed = replace(PARAMS, init_image=InitImage(PIXELS, 0.5))
    picture = opened(make(ImageFiles(), image_format, changed))
    assert source_type(picture) == "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"


@pytest.mark.parametrize("image_format", FORMATS)
def test_each_can_be_left_out(image_format: ImageFormat) -> None:
    picture = opened(make(ImageFiles(embed_parameters=False), image_format))
    assert parameters(picture) is None
    assert source_type(picture)
    picture = opened(make(ImageFiles(mark_ai=False), image_format))
    assert parameters(picture)
    assert source_type(picture) is None


@pytest.mark.parametrize("image_format", FORMATS)
def test_without_metadata_a_file_has_only_its_pixels(image_format: ImageFormat) -> None:
    bare = make(ImageFiles(embed_parameters=False, mark_ai=False), image_format)
    assert not [word for word in (b"parameters", b"xmp", b"Exif", b"EXIF", b"XMP") if word in bare]
    assert np.array_equal(np.asarray(opened(bare)), np.asarray(opened(make(ImageFiles(), image_format))))


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_same_request_gives_the_same_bytes(image_format: ImageFormat) -> None:
    assert make(ImageFiles(), image_format) == make(ImageFiles(), image_format)


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_longest_prompts_fit(image_format: ImageFormat) -> None:
    """Of characters that take four bytes, where a segment of a JPEG file has room for 64 KiB."""
    longest = prompted("🚣" * PROMPT_LENGTH, "🌊" * PROMPT_LENGTH)
    text = parameters(opened(make(ImageFiles(), image_format, longest, model="🚣" * LONGEST_NAME)))
    assert text
    assert text.count("🌊") == PROMPT_LENGTH


@pytest.mark.parametrize("image_format", FORMATS)
def test_what_a_prompt_holds_cannot_break_a_file(image_format: ImageFormat) -> None:
    """Nor end the text early, or be taken for markup."""
    hostile = 'a\0b\x1a\ud83d\udcff <x:xmpmeta>]]> "\\ \u2028 \ufffe'
    text = parameters(opened(make(ImageFiles(), image_format, prompted(hostile))))
    assert text
    assert text.startswith('a b ?? <x:xmpmeta>]]> "\\ \u2028 \ufffe\nSteps: 20')
