"""The bodies that callers send and receive. Strict: no coercion, no unknown fields, every bound named."""

from __future__ import annotations

import binascii
import re
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from engines.schedulers import FinalSigma, Sigmas, Spacing
from server.requests.images import ImageFormat
from server.requests.request import Cache, GenerationParams
from server.requests.tokenizer import Syntax
from server.requests.uploads import MAX_FILE

PROMPT_LENGTH = 4000  # characters
MAX_SEED = 2**32 - 1  # torch's generator reads no more than these bits

_DATA_URL = re.compile(r"data:image/[\w.+-]{1,30};base64,", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]{0,30}:", re.IGNORECASE)


def _decode(text: object) -> bytes:
    """The file in base64 text (RFC 4648, section 4; lines may be broken) or in a data: URL of it."""
    if isinstance(text, bytes):  # which neither JSON nor a form can say
        return text
    if not isinstance(text, str):
        raise PydanticCustomError("picture", "Input should be a file, as base64 text")
    if prefix := _DATA_URL.match(text):
        text = text[prefix.end() :]
    if _URL.match(text):
        raise PydanticCustomError("picture", "URLs are not fetched: send the file itself, base64 or multipart")
    try:
        content = binascii.a2b_base64(text.replace("\r", "").replace("\n", ""), strict_mode=True)
    except ValueError:
        raise PydanticCustomError("picture", "Input should be base64, as of RFC 4648, section 4") from None
    if not 0 < len(content) <= MAX_FILE:
        raise PydanticCustomError("picture", f"The file should have at least a byte, and at most {MAX_FILE} bytes")
    return content


Picture = Annotated[
    bytes, BeforeValidator(_decode), WithJsonSchema({"type": "string", "contentEncoding": "base64", "minLength": 1})
]
Side = Annotated[int, Field(ge=8, le=8192, description="pixels; default: the model's first resolution")]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class GenerateRequest(_Body):
    """What to draw. Everything but the prompt has a default, the model's own where it has one."""

    prompt: str = Field(
        max_length=PROMPT_LENGTH, description="what the picture shows", examples=["a red heart on a yellow background"]
    )
    negative_prompt: str = Field("", max_length=PROMPT_LENGTH, description="what it should not show")
    prompt_syntax: Syntax = Field(
        "a1111", description="a1111 reads (weights:1.2), [less of it] and BREAK; plain reads every character as written"
    )
    clip_skip: int = Field(
        0, ge=0, le=64, description="layers of the text encoder to leave out at its end; not for the negative prompt"
    )
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
    guidance_start: float = Field(0.0, ge=0, lt=1, description="of the way: where guidance begins")
    guidance_end: float = Field(
        1.0, gt=0, le=1, description="where it ends; outside, the negative prompt has no say and a step costs half"
    )
    guidance_rescale: float = Field(0.0, ge=0, le=1, description="not done: only 0 is taken")
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="the same seed gives the same picture; default: a random one"
    )
    num_images: int = Field(1, ge=1, le=64, description="pictures, of seeds seed, seed+1, …")
    scheduler: str | None = Field(
        None,
        max_length=64,
        description="the numerical method: our name, diffusers' class, or the name in AUTOMATIC1111's web UI; "
        "GET /schedulers lists them all",
        examples=["dpmpp_2m_karras", "EulerAncestralDiscreteScheduler", "DPM++ 2M Karras"],
    )
    sigmas: Sigmas | None = Field(None, description="how noise levels are spaced; also a suffix of scheduler")
    timestep_spacing: Spacing | None = Field(None, description="how timesteps are spaced; default: the checkpoint's")
    final_sigmas_type: FinalSigma | None = Field(None, description="where steps end; default: the checkpoint's")
    eta: float | None = Field(None, ge=0, le=1, description="how much fresh noise ddim and tcd take")
    image_format: ImageFormat = Field("png", description="format of the pictures in a JSON answer")
    preview_every: int = Field(
        0, ge=0, le=200, description="with text/event-stream: show a preview every so many steps; 0: none"
    )
    image: Picture | None = Field(
        None,
        repr=False,
        description="a PNG, JPEG or WebP file to start from, stretched to width and height; transparency becomes white",
    )
    mask: Picture | None = Field(
        None,
        repr=False,
        description="such a file as large as the image: what is bright in it is drawn anew, and what is dark stays; "
        "transparency has no say",
    )
    strength: float | None = Field(
        None,
        ge=0,
        le=1,
        description="with image: how much of the way is gone again, 1 keeping next to nothing; "
        "default: 0.8, and 1 with a mask",
    )
    exact: bool = Field(
        False, description="share steps with nobody: the same engine then gives the same picture bit for bit"
    )

    cache: Cache | None = Field(
        None,
        description="fast: two steps of three take what the UNet's deep layers made of the step before them, which is "
        "quicker and changes the picture a little; default: the server's, which is off unless set",
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
    """The request with every default filled in: sent again, with its image and mask, it gives the same pictures."""

    prompt: str
    negative_prompt: str
    prompt_syntax: Syntax
    clip_skip: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    guidance_start: float
    guidance_end: float
    seed: int
    num_images: int
    scheduler: str
    timestep_spacing: Spacing | None
    final_sigmas_type: FinalSigma | None
    eta: float | None
    strength: float | None = Field(description="None where no image was sent; pictures are not repeated here")
    exact: bool
    cache: Cache

    @classmethod
    def of(cls, params: GenerationParams) -> Self:
        """The fields of `params` by their own names, and those that the API names or groups differently."""
        scheduler = params.scheduler
        same = {name: getattr(params, name) for name in cls.model_fields if hasattr(params, name)}
        renamed = {
            "prompt": params.prompt.text,
            "negative_prompt": params.negative_prompt.text,
            "prompt_syntax": params.prompt.syntax,
            "width": params.size.width,
            "height": params.size.height,
            "seed": params.seeds[0],
            "num_images": len(params.seeds),
            "scheduler": scheduler.name,
            "timestep_spacing": scheduler.timestep_spacing,
            "final_sigmas_type": scheduler.final_sigmas_type,
            "eta": scheduler.eta,
            "strength": params.init_image.strength if params.init_image else None,
            "exact": params.isolated,
        }
        return cls(**(same | renamed))


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
    schedulers: list[str] = Field(description="GET /schedulers tells more of them")
    scheduler: str = Field(description="the default")
    num_inference_steps: int = Field(description="the default")
    guidance_scale: float = Field(description="the default")
    max_rows: int = Field(description="UNet rows of one request: a guided image takes two, an unguided one takes one")
    examples: list[str]


class SchedulerDescription(BaseModel):
    """A numerical method, and what may be said of it in a request."""

    name: str
    title: str
    summary: str
    aliases: list[str] = Field(description="other names that are taken for it; case does not matter")
    calls_per_step: int = Field(description="UNet calls")
    stochastic: bool = Field(description="takes fresh noise on the way, without being asked to")
    sigmas: list[Sigmas]
    options: list[str] = Field(description="further fields of a request that it heeds")


class Readiness(BaseModel):
    """Whether requests are answered, and what the server is at."""

    ready: bool
    detail: str = Field(description="'loading the engines', 'warming up 512x512', 'ready' …")


class Problem(BaseModel):
    """What went wrong; RFC 9457."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[dict[str, str]] = Field(default=[], description="field and message of each field at fault")
