"""The five graphs as torch modules, shaped for serving: everything of a denoising step that touches pixels is inside.

Letters that vary between calls: S slots, C chunks of prompts, L chunks each row is told, B images and R rows of one
step, P places for kept features, N chunks to encode, n images decoded or encoded, h×w latent size, H×W picture size.
Fixed by the checkpoint: c latent channels, f channels of features, T tokens the text encoder reads at once, D context
width, V words it knows, E its hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engines.contract import INPAINT_LANES, LANES, MEMORY, TERMS

VARYING = frozenset("SCLBRPNnhwHW")
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output: its dtype, its dimensions, and for an input the bound below which its values lie, if any."""

    dtype: torch.dtype
    dims: tuple[str | int, ...]
    below: str | int | None = None


def _f32(*dims: str | int, below: int | None = None) -> Port:
    return Port(torch.float32, dims, below)


def _index(*dims: str, of: str | int) -> Port:
    return Port(torch.int64, dims, of)


def _u8(*dims: str | int) -> Port:
    return Port(torch.uint8, dims, 256)


class GraphModule(nn.Module):
    """A graph's computation, and the names, types and shapes by which engines are bound.

    It returns a tensor, or a tuple of them where there are several outputs.
    """

    inputs: ClassVar[Mapping[str, Port]]
    outputs: ClassVar[Mapping[str, Port]]


class EncodePrompt(GraphModule):
    """Token ids to embeddings: one of the text encoder's hidden states, normalized, and its tokens weighted."""

    inputs: ClassVar = {
        "ids": _index("N", "T", of="V"),
        "layer": _index("N", of="E"),  # which hidden state; the last, unless clip_skip asks for an earlier one
        "weights": _f32("N", "T", below=2),  # of the tokens; 1 changes nothing
    }
    outputs: ClassVar = {"embeddings": _f32("N", "T", "D")}

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids: Tensor, layer: Tensor, weights: Tensor) -> Tensor:
        states = self.text_encoder(input_ids=ids, output_hidden_states=True).hidden_states
        chosen = torch.stack(states, dim=1)[torch.arange(ids.shape[0]), layer]  # [N, T, D]
        embeddings: Tensor = self.text_encoder.final_layer_norm(chosen).float()
        weighted = embeddings * weights[:, :, None]
        # As AUTOMATIC1111's web UI does: emphasis changes the balance of a chunk's tokens, not their mean. Where values
        # cancel out there is no mean to restore.
        before, after = (values.mean(dim=(1, 2), keepdim=True) for values in (embeddings, weighted))
        meant = after.abs() > 1e-3 * weighted.abs().mean(dim=(1, 2), keepdim=True)
        return weighted * torch.where(meant, before / torch.where(meant, after, 1.0), 1.0)


class Denoise(GraphModule):
    """One denoising step of B images, whichever schedulers, guidances and steps they are at.

    A state's lane 0 is x, the next `MEMORY` are the scheduler's memory, and the last is the x0 estimate. The output is
    the next state; slots that take no step keep their contents. An image for which the UNet computes NaN or infinity
    becomes NaN, and the others are what they are without it. The features are what a row's next steps may take in place
    of computing them; see `ShallowDenoise`.
    """

    inputs: ClassVar = {
        "state": _f32("S", LANES, "c", "h", "w"),
        "context": _f32("C", "T", "D"),  # embeddings of chunks of prompts
        "kept": _f32("S", INPAINT_LANES, "c", "h", "w"),  # for inpainting; zeros elsewhere
        "noise": _f32("B", "c", "h", "w"),  # fresh, for stochastic schedulers
        "slot": _index("B", of="S"),  # the slots that take this step
        "row_image": _index("R", of="B"),  # which of the B images each row sees
        "row_context": _index("R", "L", of="C"),  # which chunks each row is told
        "timestep": _f32("R", below=1000),
        "guidance": _f32("B", "R"),  # how rows combine into each image's model output
        "scale": _f32("B"),  # c_in
        "coef": _f32("B", LANES, TERMS),  # lane i becomes the sum over j of coef[i, j] · term j
        "level": _f32("B", 2),  # signal and noise of what is kept, after this step
    }
    outputs: ClassVar = {
        "state_next": _f32("S", LANES, "c", "h", "w"),
        "features": _f32("R", "f", "h", "w"),
    }

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.feature_channels: int = unet.up_blocks[-1].resnets[-1].in_channels - unet.conv_in.out_channels

    def forward(  # noqa: PLR0913, PLR0917 - the graph's inputs, bound by name
        self,
        state: Tensor,
        context: Tensor,
        kept: Tensor,
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
        features: Tensor | None = None,
        row_feature: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        dtype = self.unet.dtype
        lanes = state[slot]  # [B, LANES, c, h, w]
        x = lanes[:, 0]
        seen = (x * scale[:, None, None, None])[row_image].to(dtype)  # [R, c, h, w]
        told = context[row_context].flatten(1, 2).to(dtype)  # [R, L·T, D]
        condition = None if guidance_embedded is None else self._embed(guidance_embedded).to(dtype)
        if features is None or row_feature is None:
            rows, deep = self._full(seen, timestep, told, condition)
        else:
            rows, deep = self._shallow(seen, timestep, told, condition, features[row_feature].to(dtype)), None
        model = _guided(guidance, rows.float().flatten(1)).view_as(x)  # [B, c, h, w]
        terms = torch.cat([torch.stack([x, model, noise], dim=1), lanes[:, 1 : 1 + MEMORY]], dim=1)
        following = (coef @ terms.flatten(2)).view_as(lanes)
        kept = kept[slot]
        still = kept[:, 2:]  # [B, 1, c, h, w], 1 where it stays
        held = (level[:, :, None, None, None] * kept[:, :2]).sum(dim=1, keepdim=True)
        following = torch.cat([following[:, :1] * (1 - still) + held * still, following[:, 1:]], dim=1)
        state_next = state.index_put((slot,), following)
        return state_next if deep is None else (state_next, deep.float())

    def _full(self, seen: Tensor, timestep: Tensor, told: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """The UNet's output for each row, and what its last layer was given by those below: [R, f, h, w]."""
        found: list[Tensor] = []
        last = self.unet.up_blocks[-1]
        before = (last.attentions if _attends(last) else last.resnets)[-2]
        hook = before.register_forward_hook(lambda _layer, _given, made: found.append(_tensor(made)))
        try:
            rows = self.unet(seen, timestep, told, timestep_cond=condition, return_dict=False)[0]
        finally:
            hook.remove()
        return rows, found[0]

    def _shallow(self, seen: Tensor, timestep: Tensor, told: Tensor, condition: Tensor | None, deep: Tensor) -> Tensor:
        """The UNet's output for each row by its first convolution and its last layer, as diffusers runs them."""
        unet = self.unet
        embedded = unet.time_embedding(unet.get_time_embed(sample=seen, timestep=timestep), condition)
        last = unet.up_blocks[-1]
        rows = last.resnets[-1](torch.cat([deep, unet.conv_in(seen)], dim=1), embedded)
        if _attends(last):
            rows = last.attentions[-1](rows, encoder_hidden_states=told, return_dict=False)[0]
        made: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(rows)))
        return made

    def _embed(self, w: Tensor) -> Tensor:
        """Guidance as sines and cosines [R, width]; Luo et al. (2023), Latent Consistency Models, section 4.3."""
        half = self.unet.config.time_cond_proj_dim // 2
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000) / (half - 1)))
        angles = 1000 * w[:, None] * frequencies
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def _attends(block: Any) -> bool:
    return getattr(block, "has_cross_attention", False)


def _tensor(made: Any) -> Tensor:
    """What a layer returns, bare or in a tuple."""
    tensor: Tensor = made[0] if isinstance(made, tuple) else made
    return tensor


def _guided(guidance: Tensor, rows: Tensor) -> Tensor:
    """What rows [R, P] come to in each image, by weights [B, R]: [B, P], NaN where a row with a weight is not finite.

    The product alone would spread one row's NaN over every image of the batch: 0 times NaN is NaN.
    """
    finite = _finite(rows)
    broken = torch.where(finite, 0.0, 1.0).amax(dim=1)  # [R], of 0 and 1
    lost = torch.where(guidance != 0, broken, 0.0).amax(dim=1, keepdim=True)  # [B, 1], of 0 and 1
    model = guidance @ torch.where(finite, rows, 0.0)
    return torch.where(lost > 0, torch.nan, model)


def _finite(values: Tensor) -> Tensor:
    """Which are neither NaN nor infinite. By size, since optimizers may take `x == x` for true."""
    return values.abs() <= _LARGEST


class GuidedDenoise(Denoise):
    """The step of a UNet that was distilled with its guidance, and is told it instead of asked twice."""

    inputs: ClassVar = {**Denoise.inputs, "guidance_embedded": _f32("R")}  # the guidance scale minus 1


class ShallowDenoise(Denoise):
    """A step that takes the features of an earlier one, and computes the first and the last layer of the UNet alone.

    Between neighbouring steps the deep layers hardly change; Ma et al. (2024), DeepCache.
    """

    inputs: ClassVar = {
        **Denoise.inputs,
        "features": _f32("P", "f", "h", "w"),  # kept from earlier steps
        "row_feature": _index("R", of="P"),  # which of them each row takes
    }
    outputs: ClassVar = {"state_next": Denoise.outputs["state_next"]}


class GuidedShallowDenoise(ShallowDenoise):
    """The shallow step of a UNet that is told its guidance."""

    inputs: ClassVar = {**ShallowDenoise.inputs, "guidance_embedded": _f32("R")}


class Decode(GraphModule):
    """What some slots hold, to RGB pictures, and whether each is sound: every value a number before it was rounded.

    `vae` is the model's own, or what was distilled from it, which takes latents divided by a factor of its own.
    """

    inputs: ClassVar = {
        "state": _f32("S", LANES, "c", "h", "w"),
        "slot": _index("n", of="S"),
    }
    outputs: ClassVar = {
        "images": _u8("n", "H", "W", 3),
        "sound": _f32("n"),  # 1, or 0 where latents or the VAE were not finite
    }

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor: float = vae.config.scaling_factor

    def forward(self, state: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        latents = state[slot, 0] / self.scaling_factor
        pixels: Tensor = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()
        # Rounding as diffusers does; channels go last before the cast because TensorRT takes UINT8 as an output only.
        images = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().permute(0, 2, 3, 1).to(torch.uint8)
        # Distilled decoders bend any latent into their range: only the latents themselves tell that they are infinite.
        sound = [torch.where(_finite(values), 1.0, 0.0).amin(dim=(1, 2, 3)) for values in (pixels, latents)]
        return images, torch.minimum(*sound)


class EncodeImage(GraphModule):
    """RGB pictures to latents: a sample of the VAE's posterior, drawn with the given noise."""

    inputs: ClassVar = {"images": _u8("n", "H", "W", 3), "noise": _f32("n", "c", "h", "w")}
    outputs: ClassVar = {"latents": _f32("n", "c", "h", "w")}

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor: float = vae.config.scaling_factor

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        pixels = images.float().permute(0, 3, 1, 2) / 127.5 - 1
        posterior = self.vae.encode(pixels.to(self.vae.dtype), return_dict=False)[0]
        latents: Tensor = posterior.mean.float() + posterior.std.float() * noise
        return latents * self.scaling_factor
