"""A distilled decoder that replaces the VAE's. Reads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engines.checkpoints.diffusers_folder import CheckpointConfig, read_json
from engines.checkpoints.errors import CheckpointError

DECODER_CONFIG, DECODER_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Decoder:
    """The folder of a diffusers `AutoencoderTiny`, whose decoder replaces the VAE's."""

    name: str
    folder: Path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return read_json(self.folder / DECODER_CONFIG, f"{self.name} is not a diffusers AutoencoderTiny")

    @property
    def weights(self) -> Path:
        return self.folder / DECODER_WEIGHTS

    @property
    def downscale(self) -> int:
        """Pixels per latent, in each direction."""
        stages = len(self.config.get("num_decoder_blocks", (3, 3, 3, 1)))
        downscale: int = self.config.get("upsampling_scaling_factor", 2) ** (stages - 1)
        return downscale


def check_decoder_kind(decoder: Decoder) -> None:
    """Raise CheckpointError unless the decoder is an AutoencoderTiny."""
    if (kind := decoder.config.get("_class_name")) != "AutoencoderTiny":
        raise CheckpointError(
            f"{decoder.name} is of class {kind}. A decoder that replaces the VAE's must be an AutoencoderTiny, such as "
            "madebyollin/taesd."
        )


def check_decoder_fits(decoder: Decoder, config: CheckpointConfig) -> None:
    """Raise CheckpointError unless the decoder turns this model's latents into RGB, as far as its config says."""
    latent = config.latent
    channels, colors = decoder.config.get("latent_channels", 4), decoder.config.get("out_channels", 3)
    if (channels, decoder.downscale, colors) != (latent.channels, latent.downscale, 3):
        raise CheckpointError(
            f"{decoder.name} decodes latents with {channels} channels and {decoder.downscale} pixels per latent to "
            f"{colors} colors; {config.name} has {latent.channels} channels, {latent.downscale} pixels per latent and "
            "3 colors. Pass a decoder made for this kind of model."
        )
