"""Bodies of txt2img and img2img: the fields that decide the images. `neutral` checks the other ones that clients send.

JSON types are strict, as in latentd's own API; null means the default in every field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from engines.limits import MAX_GUIDANCE, MAX_SIDE, MAX_STEPS, MIN_SIDE, PROMPT_LENGTH
from server.requests.depths import Cache
from server.requests.field_types import ImageFile
from server.requests.schemas import MAX_SEED

MAX_IMAGES = 64  # of one call
_LONGEST_NAME = 200  # characters


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Int = Annotated[int, BeforeValidator(_whole)]  # languages without integers send 20.0
_Side = Annotated[_Int, Field(ge=MIN_SIDE, le=MAX_SIDE, description="in pixels; default: the model's first resolution")]
_Flag = bool | Annotated[int, Field(ge=0, le=1)]
_Name = Annotated[str, Field(max_length=_LONGEST_NAME)]
_Blur = Annotated[_Int, Field(ge=0, le=64)]


class Txt2Img(BaseModel):
    """Text to image. Everything is optional; fields that are not listed must have a value without effect."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    prompt: str | None = Field("", max_length=PROMPT_LENGTH)
    negative_prompt: str | None = Field("", max_length=PROMPT_LENGTH)
    seed: _Int | None = Field(-1, ge=-1, le=MAX_SEED, description="-1: random; image i has seed + i")
    steps: _Int | None = Field(None, ge=1, le=MAX_STEPS, description="default: the model's")
    cfg_scale: float | None = Field(None, ge=0, le=MAX_GUIDANCE, description="guidance; default: the model's")
    width: _Side | None = None
    height: _Side | None = None
    batch_size: _Int | None = Field(1, ge=1, le=MAX_IMAGES, description="images that are made together")
    n_iter: _Int | None = Field(
        1, ge=1, le=MAX_IMAGES, description="batches, one after the other; 64 images in all at most"
    )
    sampler_name: _Name | None = Field(
        None, description="a name of GET samplers, with or without a scheduler: DPM++ 2M Karras; default: the model's"
    )
    sampler_index: _Name | None = Field(None, description="the sampler where there is no sampler_name")
    scheduler: _Name | None = Field(None, description="a name of GET schedulers; Automatic: the checkpoint's own")
    eta: float | None = Field(
        None, ge=0, le=1, description="noise of DDIM and TCD; ancestral and SDE samplers have 1, and no other one any"
    )
    override_settings: dict[str, Any] | None = Field(
        None,
        max_length=64,
        description="CLIP_stop_at_last_layers, sd_model_checkpoint, sd_vae_decode_method, and what is already so",
    )
    cache: Cache | None = Field(None, description="extension: fewer operations for the image, as in /generate")
    send_images: bool | None = Field(True, description="false: the reply has no images")
    force_task_id: _Name | None = Field(None, description="the job in the replies of GET progress; default: random")


class Img2Img(Txt2Img):
    """Image to image, and inpainting."""

    init_images: list[ImageFile] = Field(
        min_length=1, max_length=1, repr=False, description="one PNG, JPEG or WebP file, in base64"
    )
    denoising_strength: float | None = Field(0.75, ge=0, le=1)
    resize_mode: Literal[0, 1, 2] | None = Field(0, description="0: stretch, 1: crop, 2: fill the borders")
    mask: ImageFile | None = Field(
        None, repr=False, description="a file like the image; white, or opaque, areas are repainted"
    )
    mask_blur: _Blur | None = Field(4, description="of the mask's edges, in pixels")
    mask_blur_x: _Blur | None = Field(None, description="default: mask_blur")
    mask_blur_y: _Blur | None = Field(None, description="default: mask_blur")
    inpainting_mask_invert: _Flag | None = Field(0, description="1: the mask's black areas are repainted")
    inpainting_fill: Literal[0, 1] | None = Field(
        0, description="what the masked area starts from; 0: the colours around it, 1: the image"
    )
    inpaint_full_res: _Flag | None = Field(
        True, description="whether the masked area alone is made, at the full size, and put into the image"
    )
    inpaint_full_res_padding: _Int | None = Field(0, ge=0, le=256, description="pixels around the masked area")
    include_init_images: bool | None = Field(False, description="whether parameters repeats the image and the mask")


class Generated(BaseModel):
    """The images, and how they were made."""

    images: list[str] = Field(description="PNG files in base64")
    parameters: dict[str, Any] = Field(description="the request")
    info: str = Field(description="JSON: the seeds, the infotexts and more")
