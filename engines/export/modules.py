"""The graphs as torch modules, shaped for serving: everything of a denoising step that touches pixels is inside.

Shapes in comments use the letters of `engines.contract`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from engines.contract import GUIDANCE_EMBEDDED, MASK, MEMORY, TEXT_EMBEDS, TIME_IDS, GraphName, Port
from engines.export.graph_module import GraphModule
from engines.export.lora import LoraUpdates, updated
from engines.manifest import LoraLayer

_LARGEST = torch.finfo(torch.float32).max
_LARGEST_HALF = torch.finfo(torch.float16).max
_GREY = 127.5  # of RGB values; 0 to the VAE


class Denoise(GraphModule):
    """One denoising step of B images, whichever schedulers, guidances and steps they are at.

    A state's lane 0 is x, the next `MEMORY` are the scheduler's memory, and the last is the x0 estimate. The output is
    the next state; slots that take no step keep their contents. An image for which the UNet computes NaN or infinity
    becomes NaN, and the others are what they would be without it. The features may stand in for the deep layers in a
    row's next steps; see `ShallowDenoise`.
    """

    graph: ClassVar[GraphName] = "denoise"

    def __init__(self, unet: Any, lora_layers: Sequence[LoraLayer] = ()) -> None:
        """`lora_layers` are those that LoRAs update, in the variants for them."""
        super().__init__()
        self.unet = unet
        self.updates = LoraUpdates("unet", unet, lora_layers)
        self.optional = tuple(_further_inputs(unet.config))
        self.inpaints: bool = (
            unet.config.in_channels != unet.config.out_channels
        )  # a mask and the masked image follow x
        self.feature_channels: int = unet.up_blocks[-1].resnets[-1].in_channels - unet.conv_in.out_channels

    def forward(  # noqa: PLR0913, PLR0917 - the graph's inputs, bound by name
        self,
        state: Tensor,
        context: Tensor,
        inpaint: Tensor,
        noise: Tensor,
        slot: Tensor,
        row_image: Tensor,
        row_context: Tensor,
        timestep: Tensor,
        guidance: Tensor,
        scale: Tensor,
        coef: Tensor,
        level: Tensor,
        guidance_embedded: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        features: Tensor | None = None,
        row_feature: Tensor | None = None,
        lora_pool: Tensor | None = None,
        row_lora: Tensor | None = None,
        lora_weight: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        dtype = self.unet.dtype
        lanes = state[slot]  # [B, LANES, c, h, w]
        x = lanes[:, 0]
        sample = x * scale[:, None, None, None]
        if self.inpaints:
            sample = _with_mask(sample, inpaint[slot])
        sample = sample[row_image].to(dtype)  # [R, c, h, w], or [R, c + 1 + c, h, w]
        text = context[row_context].flatten(1, 2).to(dtype)  # [R, L·T, D]
        given: dict[str, Any] = {
            "timestep_cond": None if guidance_embedded is None else self._embed(guidance_embedded).to(dtype)
        }
        if text_embeds is not None:  # a prompt of several chunks has the pooled embedding of the first
            # In FP32, as what diffusers makes of `time_ids`: it joins both, and then casts them.
            given["added_cond_kwargs"] = {"text_embeds": text_embeds[row_context[:, 0]], "time_ids": time_ids}
        with updated(self.updates, lora_pool, row_lora, lora_weight):
            if features is None or row_feature is None:
                rows, deep = self._full(sample, timestep, text, given)
            else:
                rows, deep = self._shallow(sample, timestep, text, given, features[row_feature].to(dtype)), None
        guided, effect = _guided(guidance, rows.float().flatten(1))
        model = guided.view_as(x)  # [B, c, h, w]
        terms = torch.cat([torch.stack([x, model, noise], dim=1), lanes[:, 1 : 1 + MEMORY]], dim=1)
        lanes_next = (coef @ terms.flatten(2)).view_as(lanes)
        x_next = _inpainted(lanes_next[:, :1], inpaint[slot], level)
        state_next = state.index_put((slot,), torch.cat([x_next, lanes_next[:, 1:]], dim=1))
        return (state_next, effect) if deep is None else (state_next, effect, _half(deep))

    def _full(self, sample: Tensor, timestep: Tensor, text: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The UNet's output for each row, and its last layer's input from the deeper ones: [R, f, h, w]."""
        found: list[Tensor] = []
        last = self.unet.up_blocks[-1]
        before = (last.attentions if _attends(last) else last.resnets)[-2]
        hook = before.register_forward_hook(lambda _layer, _given, made: found.append(_tensor(made)))
        try:
            rows = self.unet(sample, timestep, text, **given, return_dict=False)[0]
        finally:
            hook.remove()
        return rows, found[0]

    def _shallow(self, sample: Tensor, timestep: Tensor, text: Tensor, given: dict[str, Any], deep: Tensor) -> Tensor:
        """The UNet's output for each row by its first convolution and its last layer, as diffusers runs them."""
        unet = self.unet
        embedded = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), given["timestep_cond"])
        added = unet.get_aug_embed(embedded, text, given.get("added_cond_kwargs"))
        embedded = embedded if added is None else embedded + added
        last = unet.up_blocks[-1]
        rows = last.resnets[-1](torch.cat([deep, unet.conv_in(sample)], dim=1), embedded)
        if _attends(last):
            rows = last.attentions[-1](rows, encoder_hidden_states=text, return_dict=False)[0]
        made: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(rows)))
        return made

    def _embed(self, w: Tensor) -> Tensor:
        """Guidance as sines and cosines [R, width]; Luo et al. (2023), Latent Consistency Models, section 4.3."""
        half = self.unet.config.time_cond_proj_dim // 2
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000) / (half - 1)))
        angles = 1000 * w[:, None] * frequencies
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


class ShallowDenoise(Denoise):
    """A step that takes features of an earlier one, and computes only the UNet's first convolution and last layer.

    The deep layers hardly change between neighbouring steps; Ma et al. (2024), DeepCache.
    """

    graph: ClassVar[GraphName] = "denoise_shallow"


class LoraDenoise(Denoise):
    """A step whose rows have LoRAs, each those of its own request."""

    graph: ClassVar[GraphName] = "denoise_lora"


class LoraShallowDenoise(Denoise):
    """As `ShallowDenoise`, with LoRAs."""

    graph: ClassVar[GraphName] = "denoise_shallow_lora"


class Decode(GraphModule):
    """Latents of some slots to RGB images, and whether each image is finite: no NaN or infinity before rounding.

    `vae` is the model's own, or one distilled from it, which divides latents by a scaling factor of its own.
    """

    graph: ClassVar[GraphName] = "decode"

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor: float = vae.config.scaling_factor

    def forward(self, state: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        latents = state[slot, 0] / self.scaling_factor
        pixels: Tensor = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()
        # Rounding as diffusers does; channels go last before the cast because TensorRT takes UINT8 as an output only.
        images = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().permute(0, 2, 3, 1).to(torch.uint8)
        # Distilled decoders clamp any latent into their range, so the latents are checked too.
        is_finite = [torch.where(_finite(values), 1.0, 0.0).amin(dim=(1, 2, 3)) for values in (pixels, latents)]
        return images, torch.minimum(*is_finite)


class DecodeFast(Decode):
    """As `Decode`, by a decoder distilled from the VAE's, beside it."""

    graph: ClassVar[GraphName] = "decode_fast"


class EncodeImage(GraphModule):
    """RGB images to latents: a sample of the VAE's posterior, drawn with the given noise.

    A distilled VAE returns latents and no posterior; its graph has the input `noise` all the same. For UNets that
    inpaint there is a mask, and pixels where that is 1 become grey.
    """

    graph = "encode_image"

    def __init__(self, vae: Any, *, masks: bool = False) -> None:
        super().__init__()
        self.vae = vae
        self.optional = (MASK,) if masks else ()
        self.scaling_factor: float = vae.config.scaling_factor

    def forward(self, images: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
        values = images.float()
        if mask is not None:
            values = torch.where(mask.float()[..., None] > 0, _GREY, values)
        pixels = values.permute(0, 3, 1, 2) / 127.5 - 1
        encoded = self.vae.encode(pixels.to(self.vae.dtype), return_dict=False)[0]
        latents: Tensor = encoded.float() + 0 * noise if isinstance(encoded, Tensor) else _sampled(encoded, noise)
        return latents * self.scaling_factor


def _sampled(posterior: Any, noise: Tensor) -> Tensor:
    latents: Tensor = posterior.mean.float() + posterior.std.float() * noise
    return latents


def _further_inputs(config: Any) -> Iterator[Port]:
    """The inputs that the UNet has besides those of every UNet."""
    if config.time_cond_proj_dim is not None:
        yield GUIDANCE_EMBEDDED
    if config.addition_embed_type == "text_time":
        yield from (TEXT_EMBEDS, TIME_IDS)


def _attends(block: Any) -> bool:
    return getattr(block, "has_cross_attention", False)


def _tensor(output: Any) -> Tensor:
    """A layer's output, which may be the first of a tuple."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _guided(guidance: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, P] combined into images by weights [B, R]: [B, P], NaN where a row with a weight is not finite; and the
    root mean square [B] of its difference from the rows of positive weight alone.

    The product alone would spread one row's NaN over every image of the batch: 0 times NaN is NaN.
    """
    finite = _finite(rows)
    broken = torch.where(finite, 0.0, 1.0).amax(dim=1)  # [R], of 0 and 1
    lost = torch.where(guidance != 0, broken, 0.0).amax(dim=1, keepdim=True)  # [B, 1], of 0 and 1
    known = torch.where(finite, rows, 0.0)
    model = torch.where(lost > 0, torch.nan, guidance @ known)
    positive = guidance.clamp(min=0)
    total = positive.sum(dim=1, keepdim=True).clamp(min=1)  # of padding it is 0, otherwise 1 or more
    # Divided after the product: OpenVINO would else make another product of it, and compute that in BF16.
    return model, (model - (positive @ known) / total).square().mean(dim=1).sqrt()


def _with_mask(sample: Tensor, inpaint: Tensor) -> Tensor:
    """`sample` [B, c, h, w], then the mask [B, 1, h, w] and the latents of the masked image [B, c, h, w]."""
    return torch.cat([sample, inpaint[:, 1, :1], inpaint[:, 0]], dim=1)


def _inpainted(x: Tensor, inpaint: Tensor, level: Tensor) -> Tensor:
    """`x` [B, 1, c, h, w] with the init image at the noise level (signal, sigma) [B, 2] where the keep mask is 1."""
    keep_mask = inpaint[:, 2:]  # [B, 1, c, h, w]
    original = (level[:, :, None, None, None] * inpaint[:, :2]).sum(dim=1, keepdim=True)
    return x * (1 - keep_mask) + original * keep_mask


def _half(values: Tensor) -> Tensor:
    """`values` in FP16, within its range: NaN where they are not finite, which ONNX's Clip alone does not promise."""
    if values.dtype == torch.float16:
        return values
    wide = values.float()
    return torch.where(_finite(wide), wide.clamp(-_LARGEST_HALF, _LARGEST_HALF), torch.nan).half()


def _finite(values: Tensor) -> Tensor:
    """A mask of the values that are neither NaN nor infinite. By magnitude: optimizers may fold `x == x` to true."""
    return values.abs() <= _LARGEST
