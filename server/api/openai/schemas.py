"""Request and response bodies of OpenAI's Images API. An unknown field is an error, as it is there."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from engines.limits import MAX_GUIDANCE, MAX_STEPS, PROMPT_LENGTH
from server.api.problems import explain
from server.requests.depths import Cache
from server.requests.errors import FieldError, InvalidRequest
from server.requests.field_types import HeightWidth, ImageFile, Side, TopLeft
from server.requests.images import ImageFormat
from server.requests.schemas import MAX_SEED, GenerateRequest, LoraChoices, ModelState

_SIZE = re.compile(r"[1-9]\d{0,4}x[1-9]\d{0,4}")
_IGNORED = "accepted and ignored"
_VERDICT = "extension: whether the safety checker flagged the image; null: not checked"


def _check_size(text: str) -> str:
    if text != "auto" and not _SIZE.fullmatch(text):
        raise PydanticCustomError("size", "Input should be auto or WIDTHxHEIGHT, such as 512x512")
    return text


ImageSize = Annotated[
    str, AfterValidator(_check_size), WithJsonSchema({"type": "string", "pattern": f"^(auto|{_SIZE.pattern})$"})
]


class ImagesBody(BaseModel):
    """What generations and edits share; null means the default, as leaving a field out does."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    prompt: str = Field(
        max_length=PROMPT_LENGTH,
        description="what the image should show",
        examples=["a red heart on a yellow background"],
    )
    model: str | None = Field(None, max_length=200, description="a model of GET /v1/models; default: the first of them")
    n: int | None = Field(None, ge=1, le=10, description="number of images; default: 1")
    size: ImageSize | None = Field(None, description="WIDTHxHEIGHT; auto, the default, is the model's own")
    response_format: Literal["url", "b64_json"] | None = Field(
        None, description="how to send the images; url is a data: URL; default: both"
    )
    output_format: ImageFormat | None = Field(None, description="default: png")
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of JPEG and WebP")
    stream: bool | None = Field(None, description="send server-sent events")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="with stream: unfinished images to send; default: 0"
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="images are opaque")
    quality: str | None = Field(None, description=_IGNORED)
    moderation: str | None = Field(None, description=_IGNORED)
    complexity: str | None = Field(None, description=_IGNORED)
    user: str | None = Field(None, description=_IGNORED)
    safety_identifier: str | None = Field(None, description=_IGNORED)
    # Extensions, which other servers of this API share.
    negative_prompt: str | None = Field(
        None, max_length=PROMPT_LENGTH, description="extension: what the image should not show"
    )
    num_inference_steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="extension: denoising steps")
    guidance_scale: float | None = Field(
        None, ge=0, le=MAX_GUIDANCE, description="extension: classifier-free guidance scale"
    )
    scheduler: str | None = Field(None, max_length=64, description="extension: the sampling method, as in /generate")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="extension: seed of the first image; default: random")
    cache: Cache | None = Field(None, description="extension: fewer operations for the image, as in /generate")
    decoder: Literal["vae", "fast"] | None = Field(
        None, description="extension: what makes the pixels, as in /generate"
    )
    loras: LoraChoices | None = Field(None, description="extension: LoRAs, as in /generate")
    width: Side | None = Field(None, description="extension: in pixels, instead of size")
    height: Side | None = Field(None, description="extension: in pixels, instead of size")
    original_size: HeightWidth | None = Field(None, description="extension: [height, width], as in /generate")
    crops_coords_top_left: TopLeft | None = Field(None, description="extension: [top, left], as in /generate")
    target_size: HeightWidth | None = Field(None, description="extension: [height, width], as in /generate")

    def native(self, *, steps: int) -> GenerateRequest:
        """The same request to `/generate`; `steps` is the default number. Raises InvalidRequest."""
        self._check_contradictions()
        given = {name: value for name, value in self._native_fields().items() if value is not None}
        if self.partial_images:
            given["preview_every"] = max((self.num_inference_steps or steps) // (self.partial_images + 1), 1)
        try:
            return GenerateRequest(**given)
        except ValidationError as error:  # a size within the pattern, and out of bounds
            raise explain(error) from None

    def _check_contradictions(self) -> None:
        if self.size not in (None, "auto") and (self.width or self.height):
            raise _refuse("size", "size contradicts width and height: send one of them.")
        if self.partial_images and not self.stream:
            raise _refuse("partial_images", "Partial images are sent in streams only: set stream to true.")
        if self.stream and (self.n or 1) > 1:
            raise _refuse("n", "A stream has one image: set n to 1, or leave out stream.")

    def _native_fields(self) -> dict[str, Any]:
        width, height = self._sides()
        return {
            "model": self.model,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "scheduler": self.scheduler,
            "seed": self.seed,
            "cache": self.cache,
            "decoder": self.decoder,
            "loras": self.loras,
            "width": width,
            "height": height,
            "original_size": self.original_size,
            "crops_coords_top_left": self.crops_coords_top_left,
            "target_size": self.target_size,
            "num_images": self.n,
        }

    def _sides(self) -> tuple[int | None, int | None]:
        if self.size is None or self.size == "auto":
            return self.width, self.height
        width, _, height = self.size.partition("x")
        return int(width), int(height)


class GenerationsBody(ImagesBody):
    """Parameters of a generation."""

    style: str | None = Field(None, description=_IGNORED)


class EditsBody(ImagesBody):
    """Parameters of an edit: in a form image and mask are files, in JSON base64 text."""

    LISTS: ClassVar[frozenset[str]] = frozenset({"image"})  # which clients may send as image[]

    image: ImageFile = Field(repr=False, description="the image to edit: a PNG, JPEG or WebP file; one only")
    mask: ImageFile | None = Field(
        None,
        repr=False,
        description="where to edit the image: where this PNG, JPEG or WebP file is transparent; if it is nowhere so, "
        "where it is white; default: everywhere",
    )
    strength: float | None = Field(
        None, ge=0, le=1, description="extension: how much to change the image; default: 0.8, or 1 with a mask"
    )
    input_fidelity: str | None = Field(None, description=_IGNORED)

    def _native_fields(self) -> dict[str, Any]:
        return {**super()._native_fields(), "image": self.image, "mask": self.mask, "strength": self.strength}


class ImageData(BaseModel):
    """A generated image."""

    b64_json: str | None = Field(description="the file in base64; null with response_format url")
    url: str | None = Field(description="the file in a data: URL; null with response_format b64_json")
    seed: int = Field(description="extension: the seed that makes it again")
    nsfw_content_detected: bool | None = Field(description=_VERDICT)


class TokenDetails(BaseModel):
    """Tokens by kind."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """The tokens that the text encoder reads; images are not made of tokens."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    total_tokens: int


class ImagesResponse(BaseModel):
    """The images."""

    created: int = Field(description="Unix time in seconds")
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    size: str = Field(description="WIDTHxHEIGHT")
    usage: Usage


class PartialImageEvent(BaseModel):
    """Event `image_generation.partial_image` or `image_edit.partial_image`: the image so far."""

    type: str
    b64_json: str
    partial_image_index: int = Field(description="counted from 0")
    created_at: int = Field(description="Unix time in seconds")
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat


class CompletedEvent(BaseModel):
    """Event `image_generation.completed` or `image_edit.completed`: the image."""

    type: str
    b64_json: str
    created_at: int = Field(description="Unix time in seconds")
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    usage: Usage
    seed: int = Field(description="extension: the seed that makes it again")
    nsfw_content_detected: bool | None = Field(description=_VERDICT)


class Model(BaseModel):
    """A model of the server."""

    id: str
    state: ModelState = Field(description="extension: requests are accepted while it is ready")
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time in seconds at which the server started")
    owned_by: Literal["latentd"] = "latentd"


class ModelList(BaseModel):
    """The models, of which the first is the default."""

    object: Literal["list"] = "list"
    data: list[Model]


def _refuse(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, fields=(FieldError(field, message),))
