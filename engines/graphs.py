"""The four graphs as torch modules, shaped for serving: everything of a denoising step that touches pixels is inside.

Letters: S slots, C context rows, B images and R rows of one step, n images decoded or encoded, N prompts,
K = `MEMORY` lanes of scheduler memory, c latent channels, h×w latent size, L tokens, D context width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engines.base import MEMORY


class EncodePrompt(nn.Module):
    """ids [N, L] i64 -> embeddings [N, L, D]: the text encoder's last hidden state."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids: Tensor) -> Tensor:
        embeddings: Tensor = self.text_encoder(input_ids=ids, return_dict=False)[0]
        return embeddings.float()


class Denoise(nn.Module):
    """One denoising step of B images, whichever schedulers, guidances and steps they are at.

    state        [S, LANES, c, h, w]  f32  lane 0 is x, the next K the scheduler's memory, the last the x0 estimate
    context      [C, L, D]            f32  prompt embeddings
    noise        [B, c, h, w]         f32  fresh noise of stochastic schedulers
    slot         [B]                  i64  the slots that take this step
    row_image    [R]                  i64  which of the B images each row sees
    row_context  [R]                  i64  which prompt each row is told
    timestep     [R]                  f32
    guidance     [B, R]               f32  how rows combine into each image's model output
    scale        [B]                  f32  c_in
    coef         [B, LANES, TERMS]    f32  lane i becomes the sum over j of coef[i, j] · term j
    -> state'    as state; slots that take no step keep their contents
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.dtype = unet.dtype

    def forward(  # noqa: PLR0913, PLR0917 - the graph's inputs, bound by name
        self,
        state: Tensor,
        context: Tensor,
        noise: Tensor,
        slot: Tensor,
        row_image: Tensor,
        row_context: Tensor,
        timestep: Tensor,
        guidance: Tensor,
        scale: Tensor,
        coef: Tensor,
    ) -> Tensor:
        lanes = state[slot]  # [B, LANES, c, h, w]
        x = lanes[:, 0]
        seen = (x * scale[:, None, None, None])[row_image]  # [R, c, h, w]
        rows = self.unet(seen.to(self.dtype), timestep, context[row_context].to(self.dtype), return_dict=False)[
            0
        ].float()
        model = (guidance @ rows.flatten(1)).view_as(x)  # [B, c, h, w]
        terms = torch.cat([torch.stack([x, model, noise], dim=1), lanes[:, 1 : 1 + MEMORY]], dim=1)
        new = (coef @ terms.flatten(2)).view_as(lanes)
        return state.index_put((slot,), new)


class Decode(nn.Module):
    """state [S, LANES, c, h, w] f32, slot [n] i64, lane [n] i64 -> images [n, H, W, 3] u8, RGB."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.dtype = vae.dtype
        self.scaling_factor: float = vae.config.scaling_factor

    def forward(self, state: Tensor, slot: Tensor, lane: Tensor) -> Tensor:
        latents = state[slot, lane] / self.scaling_factor
        pixels: Tensor = self.vae.decode(latents.to(self.dtype), return_dict=False)[0].float()
        # Rounding as diffusers does; channels go last before the cast because TensorRT takes UINT8 as an output only.
        return (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().permute(0, 2, 3, 1).to(torch.uint8)


class EncodeImage(nn.Module):
    """images [n, H, W, 3] u8, noise [n, c, h, w] f32 -> latents [n, c, h, w] f32, a sample of the VAE's posterior."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.dtype = vae.dtype
        self.scaling_factor: float = vae.config.scaling_factor

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        pixels = images.float().permute(0, 3, 1, 2) / 127.5 - 1
        posterior = self.vae.encode(pixels.to(self.dtype), return_dict=False)[0]
        latents: Tensor = posterior.mean.float() + posterior.std.float() * noise
        return latents * self.scaling_factor
