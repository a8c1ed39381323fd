"""Request and response bodies. Validation is strict: no coercion, no unknown fields, every value bounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import core_schema

from engines.contract import DecoderName
from engines.limits import MAX_GUIDANCE, MAX_STEPS, PROMPT_LENGTH
from engines.manifest import LoraPart
from engines.schedulers import FinalSigma, Sigmas, Spacing
from server.requests.context import Priority
from server.requests.depths import Cache
from server.requests.field_types import GuidanceEnd, HeightWidth, ImageFile, Side, TopLeft, read_json
from server.requests.images import ImageFormat
from server.requests.lora_tags import MAX_LORA_WEIGHT
from server.requests.params import GenerationParams
from server.requests.tokenizer import Syntax

ModelState = Literal["unloaded", "loading", "ready", "unloading", "failed"]

MAX_SEED = 2**32 - 1  # torch's generator uses the low 32 bits of a seed
MAX_TIMEOUT = 86_400  # seconds
MAX_LORAS = 16  # of one request
SIZE_CONDITIONS = ("original_size", "crops_coords_top_left", "target_size")  # fields; `time_ids` has them in this order


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


@dataclass(frozen=True, slots=True)
class _NullMeans:
    """An annotation: null means the default, as in every field that may be left out."""

    default: object

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._fill, core_schema.nullable_schema(handler(source)))

    def _fill(self, value: Any) -> Any:
        return self.default if value is None else value


_AnyCase = BeforeValidator(_lower)  # of a choice: "PNG" is png


class _StrictModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class LoraChoice(BaseModel):
    """A LoRA, and how strongly it applies."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    name: str = Field(strict=True, min_length=1, max_length=300, description="a name of GET /loras")
    weight: float = Field(
        1.0, strict=True, ge=-MAX_LORA_WEIGHT, le=MAX_LORA_WEIGHT, description="1 is as it was trained; default: 1"
    )


LoraChoices = Annotated[tuple[LoraChoice, ...], Field(strict=False, max_length=MAX_LORAS), BeforeValidator(read_json)]


class GenerateRequest(_StrictModel):
    """Parameters of a generation. Only the prompt is required; null means the default, as leaving a field out does."""

    prompt: str = Field(
        max_length=PROMPT_LENGTH,
        description="what the image should show",
        examples=["a red heart on a yellow background"],
    )
    negative_prompt: Annotated[str, _NullMeans("")] = Field(
        "", max_length=PROMPT_LENGTH, description="what the image should not show"
    )
    prompt_syntax: Annotated[Syntax, _AnyCase, _NullMeans("a1111")] = Field(
        "a1111",
        description="a1111: AUTOMATIC1111's attention syntax, (word:1.2), [word] and BREAK, and <lora:NAME:0.8>; "
        "plain: every character is literal text",
    )
    loras: Annotated[LoraChoices, _NullMeans(())] = Field(
        (),
        description='LoRAs of GET /loras, such as {"name": "style", "weight": 0.8}; a prompt may name them too, as '
        "<lora:style:0.8>, and a weight given here replaces that one",
    )
    clip_skip: Annotated[int, _NullMeans(0)] = Field(
        0,
        ge=0,
        le=64,
        description="number of final text encoder layers to skip, as in diffusers; not applied to the negative prompt",
    )
    width: Side | None = None
    height: Side | None = None
    original_size: HeightWidth | None = Field(
        None,
        description="[height, width] before scaling, a condition of models such as Stable Diffusion XL: where they are "
        "small, it draws an enlarged image; default: height and width",
    )
    crops_coords_top_left: TopLeft | None = Field(
        None,
        description="[top, left] of the crop, which conditions such a model; default: [0, 0]",
    )
    target_size: HeightWidth | None = Field(
        None,
        description="[height, width] after scaling, which conditions such a model; default: height and width",
    )
    num_inference_steps: int | None = Field(
        None,
        ge=1,
        le=MAX_STEPS,
        description="number of denoising steps; more steps take longer and add detail; default: the model's",
    )
    guidance_scale: float | None = Field(
        None,
        ge=0,
        le=MAX_GUIDANCE,
        description="classifier-free guidance scale; values <= 1 disable guidance, ignore the negative prompt and "
        "halve the cost; default: the model's",
    )
    guidance_start: Annotated[float, _NullMeans(0.0)] = Field(
        0.0, ge=0, lt=1, description="fraction of the steps after which guidance begins"
    )
    guidance_end: GuidanceEnd | None = Field(
        None,
        description="fraction of the steps after which guidance ends; unguided steps cost half; auto: it ends for each "
        "image once it changes hardly anything any more; default: auto if cache is faster, otherwise 1",
    )
    guidance_rescale: Annotated[float, _NullMeans(0.0)] = Field(
        0.0, ge=0, le=1, description="not supported: only 0 is accepted"
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="seed of the initial noise; default: random")
    num_images: Annotated[int, _NullMeans(1)] = Field(
        1, ge=1, le=64, description="number of images; image i uses seed + i, counted from 0"
    )
    scheduler: str | None = Field(
        None,
        max_length=64,
        description="the sampling method: a name of GET /schedulers, a diffusers class name, or a sampler name of "
        "AUTOMATIC1111's web UI; default: the model's",
        examples=["dpmpp_2m_karras", "EulerAncestralDiscreteScheduler", "DPM++ 2M Karras"],
    )
    sigmas: Annotated[Sigmas | None, _AnyCase] = Field(
        None, description="noise schedule (spacing of the sigmas); may also be given as a suffix of scheduler"
    )
    timestep_spacing: Annotated[Spacing | None, _AnyCase] = Field(
        None, description="spacing of the timesteps, as in diffusers; default: the checkpoint's"
    )
    final_sigmas_type: Annotated[FinalSigma | None, _AnyCase] = Field(
        None, description="final sigma of the noise schedule, as in diffusers; default: the checkpoint's"
    )
    eta: float | None = Field(
        None, ge=0, le=1, description="amount of noise added at each step, 0 to 1; only for ddim and tcd"
    )
    image_format: Annotated[ImageFormat, _AnyCase, _NullMeans("png")] = Field(
        "png", description="format of the images in a JSON response"
    )
    preview_every: Annotated[int, _NullMeans(0)] = Field(
        0,
        ge=0,
        le=MAX_STEPS,
        description="with text/event-stream: send a preview every this many steps; 0 disables previews",
    )
    image: ImageFile | None = Field(
        None,
        repr=False,
        description="initial image for image-to-image: a PNG, JPEG or WebP file, resized to width x height; "
        "transparent pixels become white",
    )
    mask: ImageFile | None = Field(
        None,
        repr=False,
        description="inpainting mask: a PNG, JPEG or WebP file; white areas are regenerated, black areas are kept; "
        "if it has transparent pixels, those are regenerated, whatever the colours; requires image",
    )
    strength: float | None = Field(
        None,
        ge=0,
        le=1,
        description="how much to change the initial image, from 0 (hardly) to 1 (almost entirely); requires image; "
        "default: 0.8, or 1 with a mask (0.9999 for Stable Diffusion XL)",
    )
    exact: Annotated[bool, _NullMeans(False)] = Field(
        False,
        description="run without batching, so that the same request on the same engine gives the same bytes, whatever "
        "else is served",
    )
    cache: Annotated[Cache | None, _AnyCase] = Field(
        None,
        description="fast: with most schedulers less than a third of the steps is computed in full, and the others "
        "reuse deep UNet features (DeepCache), which is faster and changes the image slightly; faster: about a "
        "quarter, and guidance ends by itself, a larger change; no effect up to 4 steps; default: the server's --cache "
        "setting",
    )
    full_steps: int | None = Field(
        None,
        ge=1,
        le=MAX_STEPS,
        description="how many of the denoising steps are computed in full, placed where they change most; default: as "
        "many as cache says",
    )
    decoder: Annotated[DecoderName, _AnyCase, _NullMeans("vae")] = Field(
        "vae",
        description="fast: a decoder distilled from the VAE makes the pixels, in a fraction of the time and with other "
        "fine texture and small text; only where GET /models says fast_decoder",
    )
    priority: Annotated[Priority, _AnyCase, _NullMeans("interactive")] = Field(
        "interactive",
        description="batch: interactive requests are served before it, while it keeps a share of the device",
    )
    timeout_s: float | None = Field(
        None,
        gt=0,
        le=MAX_TIMEOUT,
        description="seconds after which the request ends with 504 where it is not complete; default: no limit",
    )
    model: str | None = Field(
        None, max_length=200, description="what makes the images: a name of GET /models; default: the first of them"
    )


class GeneratedImage(BaseModel):
    """A generated image."""

    seed: int
    format: ImageFormat
    image: str = Field(description="the encoded file, in base64")
    nsfw_content_detected: bool | None = Field(
        None, description="whether the safety checker flagged it; null: it was not checked"
    )


class Timings(BaseModel):
    """Seconds spent in each stage."""

    queue: float
    encode: float
    denoise: float
    decode: float
    image: float = Field(description="encoding the image files")
    total: float


class Parameters(BaseModel):
    """The request with every default filled in; sent again with the same image and mask, it gives the same images."""

    model: str = Field("", description="its name in this server")
    prompt: str
    negative_prompt: str
    prompt_syntax: Syntax
    loras: list[LoraChoice] = Field([], description="all LoRAs, those of the prompt's tags included")
    clip_skip: int
    width: int
    height: int
    original_size: tuple[int, int] | None = Field(None, description="null: the model has no such condition")
    crops_coords_top_left: tuple[int, int] | None = Field(None, description="as original_size")
    target_size: tuple[int, int] | None = Field(None, description="as original_size")
    num_inference_steps: int
    guidance_scale: float
    guidance_start: float
    guidance_end: float | Literal["auto"]
    seed: int
    num_images: int
    scheduler: str
    timestep_spacing: Spacing | None
    final_sigmas_type: FinalSigma | None
    eta: float | None
    strength: float | None = Field(description="null without an initial image; image and mask are not echoed")
    exact: bool
    cache: Cache
    full_steps: int | None = Field(None, description="null: as many as cache says")
    decoder: DecoderName = "vae"

    @classmethod
    def of(cls, params: GenerationParams) -> Self:
        """The fields of `params` by their own names, and those that the API names or groups differently."""
        scheduler = params.scheduler
        same = {name: getattr(params, name) for name in cls.model_fields if hasattr(params, name)}
        renamed = {
            "prompt": params.prompt.text,
            "negative_prompt": params.negative_prompt.text,
            "prompt_syntax": params.prompt.syntax,
            "loras": [LoraChoice(name=lora.name, weight=weight) for lora, weight in params.loras],
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
    """The images, the parameters that were used, and the time each stage took."""

    id: str
    model: str
    images: list[GeneratedImage]
    parameters: Parameters
    timings: Timings
    warnings: list[str] = Field(description="how the result deviates from the request, as sentences")


class QueuedEvent(BaseModel):
    """Event `queued`: the request was accepted; sent again while it waits, when its position has changed."""

    id: str
    position: int = Field(description="number of requests ahead in the queue")
    estimate_s: float | None = Field(None, description="seconds, at most, until the first step; null: not known")


class StartedEvent(BaseModel):
    """Event `started`: the request has left the queue."""

    id: str


class StepEvent(BaseModel):
    """Event `step`: a denoising step is complete."""

    step: int
    steps: int
    preview: str | None = Field(description="the current estimate of the first image, a JPEG in a data: URL")
    previews: list[str] = Field(
        default=[], description="the current estimates of all images, as preview is of the first"
    )


class ModelInfo(BaseModel):
    """A model of the server: whether it is loaded, its capabilities and its defaults."""

    name: str
    state: ModelState = Field(description="requests are accepted while it is ready")
    reason: str = Field(description="why it failed to load; empty otherwise")
    backend: str
    precision: str
    resolutions: list[str] = Field(description="WIDTHxHEIGHT; the first is the default")
    schedulers: list[str] = Field(description="names; GET /schedulers describes them")
    scheduler: str = Field(description="default scheduler")
    num_inference_steps: int = Field(description="default number of steps")
    guidance_scale: float = Field(description="default guidance scale")
    timestep_spacing: Spacing | None = Field(
        None, description="default spacing of the timesteps; null: the checkpoint's"
    )
    eta: float | None = Field(None, description="default eta of the default scheduler; null: its own")
    timesteps: tuple[int, ...] | None = Field(
        None,
        description="timesteps that the model was distilled on, taken with the default scheduler and number of steps; "
        "null: those of the scheduler",
    )
    step_cache: bool = Field(description="whether requests may set cache to fast or faster")
    fast_decoder: bool = Field(False, description="whether requests may set decoder to fast")
    size_conditions: bool = Field(
        description="whether requests may set original_size, crops_coords_top_left and target_size"
    )
    max_rows: int = Field(
        description="maximum UNet rows per request; a guided image takes two rows, an unguided image one"
    )
    examples: list[str]
    notes: str = Field(description="what users should know of the model; empty where there is nothing")
    is_for_inpainting: bool = Field(
        False, description="whether it was trained to inpaint: without a mask it repaints the whole image"
    )


class LoraDescription(BaseModel):
    """A LoRA of the server's folder."""

    name: str = Field(description="what requests call it; without its folders where that is clear")
    usable: bool
    reason: str | None = Field(description="why it cannot be used with this model; null: it can")
    warning: str | None = Field(description="what will not work of it; null: nothing")
    rank: int | None = Field(description="a request has room for a sum of ranks; null: not known")
    parts: list[LoraPart] = Field(description="the parts of the model that it updates")
    size: int = Field(description="bytes of the file")
    sha256: str | None = Field(
        description="of the file, and of adapter_config.json where that decides; null until the LoRA is used"
    )
    resident: bool = Field(
        default=False, description="whether the device holds it now, so that a request need not wait"
    )
    title: str | None = Field(description="as the tool that trained it says, as the fields that follow")
    base_model: str | None
    trigger_words: str | None
    tags: list[str] = Field(description="of its training images, the most frequent first")


class SchedulerDescription(BaseModel):
    """A sampling method and its options."""

    name: str
    title: str
    summary: str
    aliases: list[str] = Field(description="other accepted names, case-insensitive")
    calls_per_step: int = Field(description="UNet calls per step")
    stochastic: bool = Field(description="adds noise at each step by default")
    sigmas: list[Sigmas]
    options: list[str] = Field(description="further request fields that apply to it")


class Readiness(BaseModel):
    """Whether the server accepts requests, and its current state."""

    ready: bool
    detail: str = Field(description="'loading the engines', 'warming up 512x512', 'ready' …")


class Problem(BaseModel):
    """Problem details (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[dict[str, str]] = Field(default=[], description="field and message of each validation error")
