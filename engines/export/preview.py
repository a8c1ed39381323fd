"""How a latent looks without the VAE's decoder: an affine map from its channels to RGB, fitted to the VAE at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from engines.manifest import Latent

_SIDE = 32  # latents of each picture that is fitted to
_CELLS = (4, 8)  # random colours to its side, at each scale; smooth between them
_SCALE = 2.0  # the colours' spread, before they are pressed into 0..1
_GRAIN = 0.1  # noise on every pixel


@torch.inference_mode()
def fit_rgb(vae: Any, latent: Latent) -> tuple[tuple[float, ...], ...]:
    """Rows for red, green and blue in 0..1: a weight for each channel of a latent as the UNet sees it, then a constant.

    Least squares over pictures made up for it, the same on every call; where latents leave a choice, the smallest.
    """
    pictures = _pictures(_SIDE * latent.downscale)
    means = torch.cat([_mean(vae.encode(2 * picture[None] - 1, return_dict=False)[0]) for picture in pictures])
    latents = functional.pad(_rows(means) * latent.scaling_factor, (0, 1), value=1.0)
    colors = _rows(functional.avg_pool2d(pictures, latent.downscale))
    weights = torch.linalg.lstsq(latents, colors, driver="gelsd").solution  # [channels + 1, 3]; gelsd: of any rank
    return tuple(tuple(row) for row in weights.T.tolist())


def _mean(encoded: Any) -> Tensor:
    """The mean of a posterior; the latents themselves where a distilled VAE returns no posterior."""
    mean: Tensor = encoded if isinstance(encoded, Tensor) else encoded.mean
    return mean


def _pictures(side: int) -> Tensor:
    """[2, 3, side, side] in 0..1: smooth random colours with grain, and their negative, so that no hue prevails."""
    generator = torch.Generator().manual_seed(0)
    field = torch.zeros(1, 3, side, side)
    for cells in _CELLS:
        colors = torch.randn(1, 3, cells, cells, generator=generator)
        field += _SCALE * functional.interpolate(colors, size=(side, side), mode="bicubic")
    grain = _GRAIN * torch.randn(2, 3, side, side, generator=generator)
    return (torch.sigmoid(torch.cat([field, -field])) + grain).clamp(0, 1)


def _rows(maps: Tensor) -> Tensor:
    """[n, c, h, w] to [n · h · w, c], f64."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2).double()
