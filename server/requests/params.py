"""The parameters of a request: everything that decides its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.contract import GUIDANCE_EMBEDDED, TIME_IDS, DecoderName
from engines.manifest import FeatureDrift, Size
from engines.schedulers import Scheduler
from engines.step_cache import DEMO_DRIFT
from server.requests.depths import FEW_STEPS, Cache
from server.requests.tokenizer import Prompt

Image = NDArray[np.uint8]  # [H, W, 3], RGB
Mask = NDArray[np.float32]  # [h, w], of latents: 1 where an image is repainted, 0 where it is kept
PixelMask = NDArray[np.uint8]  # [H, W], likewise

_NEGATIVE_IS_UNUSED = "It is not used without guidance: send a guidance_scale above 1 if the model is made for it."
_RAISED = "The server was under load and set it to {}, not {}, which changes images slightly: send cache to choose it."


@dataclass(frozen=True, slots=True, eq=False)
class InitImage:
    """The image to start from. With a mask only a part of it is repainted."""

    image: Image
    strength: float  # the share of the steps that are taken; 1 keeps next to nothing of the image
    mask: Mask | None = None
    warnings: tuple[str, ...] = ()  # sentences, each after the name of its field

    @property
    def starts_from_noise(self) -> bool:
        """Whether the image is ignored, as diffusers does for inpainting at full strength, and only there."""
        return self.mask is not None and self.strength == 1


@dataclass(frozen=True, slots=True, eq=False)
class MaskedImage:
    """What a UNet that inpaints sees besides the latents: the image without what is to be repainted, and where that is.

    Without an image, or without a mask, everything is to be repainted.
    """

    image: Image
    pixels: PixelMask
    mask: Mask  # the first of each latent's pixels


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """A LoRA that requests may choose, as the device's pool holds it."""

    name: str
    sha256: str  # of its file: the same contents take the same place in the pool
    values: NDArray[np.float16]  # [ranks, G], every scale of the file included
    updates_unet: bool
    updates_text_encoder: bool  # otherwise prompts are encoded as without it
    tensors_sha256: str = ""  # of the file without its header: what AUTOMATIC1111's web UI and Civitai know it by

    @property
    def ranks(self) -> int:
        """How many updates of rank one it is."""
        return len(self.values)


class WeightedLora(NamedTuple):
    """A LoRA of a request, and how strongly it applies."""

    lora: Lora
    weight: float


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """Everything that decides the images, with every default filled in."""

    prompt: Prompt
    negative_prompt: Prompt
    size: Size
    scheduler: Scheduler
    num_inference_steps: int
    guidance_scale: float
    seeds: tuple[int, ...]  # one per image
    guidance_start: float = 0.0  # the share of the steps after which guidance begins
    guidance_end: float | Literal["auto"] = 1.0  # and ends; auto: once it hardly changes an image any more
    clip_skip: int = 0  # layers skipped at the end of the text encoder
    init_image: InitImage | None = None
    masked: MaskedImage | None = None  # of models that inpaint, whether there is an initial image or not
    preview_every: int = 0  # steps; 0 shows none
    # Inputs of the UNet besides those of every model, the same for each row: by port, a number or numbers of a row.
    unet_inputs: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)
    isolated: bool = False  # shares no step, so that batching cannot change a bit
    cache: Cache = "off"  # fast, faster: most steps reuse the UNet's deep features of an earlier step
    raised_from: Cache | None = None  # the `cache` that it would have without load, if the server raised it
    full_steps: int | None = None  # of num_inference_steps; None: as many as the cache says
    feature_drift: FeatureDrift = DEMO_DRIFT  # of the model, by which full steps are placed
    decoder: DecoderName = "vae"  # fast: the one distilled from the VAE
    loras: tuple[WeightedLora, ...] = ()  # each once
    model: str = ""  # its name in this server
    model_sha256: str | None = None  # of the single file that it was built from, if it was

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance applies, as in diffusers: not at a scale of 1 or less."""
        return self.guidance_scale > 1 and GUIDANCE_EMBEDDED.name not in self.unet_inputs

    @property
    def ends_guidance(self) -> bool:
        """Whether guidance ends by itself, for each image of its own."""
        return self.guidance_end == "auto" and self.guided

    @property
    def original_size(self) -> tuple[int, int] | None:
        """Height and width before scaling, a condition of the UNet; None: it has none."""
        return self._time_ids(0)

    @property
    def crops_coords_top_left(self) -> tuple[int, int] | None:
        return self._time_ids(2)

    @property
    def target_size(self) -> tuple[int, int] | None:
        """Height and width after scaling, a condition of the UNet."""
        return self._time_ids(4)

    def _time_ids(self, first: int) -> tuple[int, int] | None:
        values = self.unet_inputs.get(TIME_IDS.name)
        return (int(values[first]), int(values[first + 1])) if isinstance(values, tuple) else None

    @property
    def reuses_features(self) -> bool:
        """Whether steps are shallow: the UNet's features say little of the next of few steps."""
        if self.full_steps is not None:
            return self.full_steps < self.num_inference_steps
        return self.cache != "off" and self.num_inference_steps > FEW_STEPS

    @property
    def warnings(self) -> list[str]:
        """How the images deviate from the request: sentences, each after the name of its field."""
        prompts = {"prompt": self.prompt, "negative_prompt": self.negative_prompt}
        found = [f"{field}: {warning}" for field, prompt in prompts.items() for warning in prompt.warnings]
        if self.negative_prompt.text and not self.guided:
            found.append(f"negative_prompt: {_NEGATIVE_IS_UNUSED}")
        if self.raised_from is not None:
            found.append(f"cache: {_RAISED.format(self.cache, self.raised_from)}")
        return found + list(self.init_image.warnings if self.init_image else ())
