"""The bodies that callers send and receive. Strict: no coercion, no unknown fields, every bound named."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.images import ImageFormat
from server.schedulers import NAMES

PROMPT_LENGTH = 4000  # characters
MAX_SEED = 2**32 - 1  # torch's generator reads no more than these bits

Side = Annotated[int, Field(ge=8, le=8192, description="pixels; default: the model's first resolution")]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class GenerateRequest(_Body):
    """What to draw. Everything but the prompt has a default, the model's own where it has one."""

    prompt: str = Field(
        max_length=PROMPT_LENGTH, description="what the picture shows", examples=["a red heart on a yellow background"]
    )
    negative_prompt: str = Field("", max_length=PROMPT_LENGTH, description="what it should not show")
    width: Side | None = None
    height: Side | None = None
    num_inference_steps: int | None = Field(
        None, ge=1, le=200, description="denoising steps: more are slower and finer"
    )
    guidance_scale: float | None = Field(
        None,
        ge=0,
        le=50,
        description="how closely the prompt is followed; at 1 or less "
        "the negative prompt has no say and the picture costs half",
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="the same seed gives the same picture; default: a random one"
    )
    num_images: int = Field(1, ge=1, le=64, description="pictures, of seeds seed, seed+1, …")
    scheduler: Literal[NAMES] | None = Field(None, description="the numerical method")  # type: ignore[valid-type]
    image_format: ImageFormat = Field("png", description="format of the pictures in a JSON answer")
    preview_every: int = Field(
        0, ge=0, le=200, description="with text/event-stream: show a preview every so many steps; 0: none"
    )


class GeneratedImage(BaseModel):
    """One picture."""

    seed: int
    format: ImageFormat
    image: str = Field(description="the file, base64")


class Timings(BaseModel):
    """Seconds spent in each stage."""

    queue: float
    encode: float
    denoise: float
    decode: float
    image: float = Field(description="making files of pixels")
    total: float


class Parameters(BaseModel):
    """The request with every default filled in: sent again, it gives the same pictures."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    num_images: int
    scheduler: str


class GenerateResponse(BaseModel):
    """The pictures, and how they were made."""

    id: str
    model: str
    images: list[GeneratedImage]
    parameters: Parameters
    timings: Timings
    warnings: list[str] = Field(description="what was done differently from what was asked, in words")


class Queued(BaseModel):
    """Event `queued`: accepted."""

    id: str
    position: int = Field(description="how many waited before it")


class Running(BaseModel):
    """Event `started`: out of the queue."""

    id: str


class Step(BaseModel):
    """Event `step`: one more UNet call is done."""

    step: int
    steps: int
    preview: str | None = Field(description="a JPEG as a data: URL, of the picture as the model sees it now")


class Model(BaseModel):
    """What the served model can do."""

    name: str
    backend: str
    precision: str
    resolutions: list[str] = Field(description="WIDTHxHEIGHT; the first is the default")
    schedulers: list[str]
    scheduler: str = Field(description="the default")
    num_inference_steps: int = Field(description="the default")
    guidance_scale: float = Field(description="the default")
    max_rows: int = Field(description="UNet rows of one request: a guided image takes two, an unguided one takes one")
    examples: list[str]


class Problem(BaseModel):
    """What went wrong; RFC 9457."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[dict[str, str]] = Field(default=[], description="field and message of each field at fault")
