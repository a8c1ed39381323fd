"""What previews are drawn with shows what the VAE would, roughly, and is found in a moment."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from engines.checkpoints.diffusers_folder import CheckpointConfig
from engines.demo import model
from engines.demo.pictures import HERE, compose, concepts
from engines.demo.restore import fill, read_weights
from engines.export.preview import fit_rgb
from engines.manifest import Latent, Manifest
from tests.support.tiny import make_checkpoint

LATENT = Latent(channels=4, downscale=4, multiple=8, scaling_factor=0.18215)


class Linear:
    """A VAE whose latents are a matrix [4, 3] times the mean colour of what they cover, and an offset."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def encode(self, pixels: Tensor, *, return_dict: bool) -> tuple[Any]:
        assert not return_dict
        mean = torch.einsum("lc,nchw->nlhw", self.matrix, functional.avg_pool2d(pixels, LATENT.downscale)) + 0.3
        return (SimpleNamespace(mean=mean),)


def drawn(preview: tuple[tuple[float, ...], ...], latents: Tensor) -> Tensor:
    """What the map makes of [n, c, h, w]: [n, 3, h, w]."""
    weights = torch.tensor(preview)
    return torch.einsum("rc,nchw->nrhw", weights[:, :-1], latents) + weights[:, -1:, None]


def test_colours_that_latents_hold_are_found_again() -> None:
    vae = Linear(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    latents = LATENT.scaling_factor * vae.encode(2 * picture - 1, return_dict=False)[0].mean
    found = drawn(fit_rgb(vae, LATENT), latents)
    assert torch.allclose(found, functional.avg_pool2d(picture, LATENT.downscale), atol=1e-4)


def test_latents_that_tell_nothing_are_grey() -> None:
    preview = fit_rgb(Linear(torch.zeros(4, 3)), LATENT)
    assert drawn(preview, torch.full((1, 4, 1, 1), 0.3 * LATENT.scaling_factor)).flatten().tolist() == pytest.approx(
        [0.5] * 3, abs=0.02
    )


def test_any_vae_gets_the_same_map_each_time(tmp_path_factory: pytest.TempPathFactory) -> None:
    config = CheckpointConfig(make_checkpoint(tmp_path_factory.mktemp("checkpoint")), "tiny")
    vae = AutoencoderKL.from_pretrained(config.folder / "vae").eval()
    state = torch.get_rng_state()
    first, second = (fit_rgb(vae, config.latent) for _ in range(2))
    assert first == second
    assert [len(row) for row in first] == [config.latent.channels + 1] * 3
    assert all(math.isfinite(weight) for row in first for weight in row)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_demos_pictures_can_be_recognised() -> None:
    """Beside the decoded pictures, at the latents' size. (Its VAE packs details into latents, so no affine map reaches
    more than 0.72.)"""
    manifest = Manifest.read(HERE)
    vae = model.new_vae().eval()
    fill(vae, "vae", read_weights(HERE, manifest))
    pictures = torch.from_numpy(np.stack([np.asarray(compose(*one)) for one in some_things(24)])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        means = vae.encode(pictures / 127.5 - 1).latent_dist.mean
        decoded = (vae.decode(means).sample / 2 + 0.5).clamp(0, 1)
    wanted = functional.avg_pool2d(decoded, manifest.latent.downscale)
    seen = drawn(fit_rgb(vae, manifest.latent), means * manifest.latent.scaling_factor).clamp(0, 1)
    error, spread = (wanted - seen).square().mean(), (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().mean()
    assert float(1 - error / spread) > 0.6


def some_things(count: int) -> list[tuple[str, str]]:
    dice = random.Random(0)
    return [(dice.choice(concepts().things), dice.choice(list(concepts().colors))) for _ in range(count)]
