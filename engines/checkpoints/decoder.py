"""A distilled decoder beside the VAE. Reads no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from engines.checkpoints.diffusers_folder import CheckpointConfig, read_json
from engines.errors import CheckpointError
from engines.safetensors_header import read_header

_FIRST_WEIGHT = re.compile(r"layers\.(\d+)\.(?:conv\.0\.)?weight")  # of a convolution, or of a block
_KERNEL_DIMS, _COLORS = 4, 3
DECODER_CONFIG, DECODER_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Decoder:
    """A diffusers `AutoencoderTiny` that decodes the VAE's latents: a folder, or its decoder alone in a file."""

    name: str
    folder: Path
    file: Path | None = None  # in the layout of TAESD's own repository, or in diffusers'

    @cached_property
    def config(self) -> Mapping[str, Any]:
        if self.file:
            return _config_of(self.file)
        return read_json(self.folder / DECODER_CONFIG, f"{self.name} is not a diffusers AutoencoderTiny")

    @property
    def weights(self) -> Path:
        return self.file or self.folder / DECODER_WEIGHTS

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that decides the decoder."""
        return (self.file,) if self.file else (self.folder / DECODER_CONFIG, self.weights)

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
            f"{decoder.name} is of class {kind}. A distilled decoder must be an AutoencoderTiny, such as "
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


def decoder_layer(key: str) -> str | None:
    """The name of a tensor within the decoder of diffusers' `AutoencoderTiny`; None where it is not of the decoder.

    TAESD's own layers are numbered from a clamp, which diffusers leaves out.
    """
    if found := re.fullmatch(r"decoder\.(layers\.\d+\..+)", key):
        return found[1]
    if found := re.fullmatch(r"(?:decoder\.)?([1-9]\d*)(\..+)", key):
        return f"layers.{int(found[1]) - 1}{found[2]}"
    return None


def _config_of(file: Path) -> dict[str, Any]:
    """The config of the `AutoencoderTiny` whose decoder is in `file`, by its shapes. Raises CheckpointError."""
    shapes = {name: shape for key, shape in read_header(file)[0].items() if (name := decoder_layer(key))}
    layers = {int(found[1]): shape for name, shape in shapes.items() if (found := _FIRST_WEIGHT.fullmatch(name))}
    blocks = {int(name.split(".")[1]) for name in shapes if ".conv." in name}
    order = sorted(layers)
    convolutions = [number for number in order if number not in blocks]
    if len(convolutions) < 2 or any(len(layers[number]) != _KERNEL_DIMS for number in order):
        raise CheckpointError(f"{file.name} is not a distilled decoder such as TAESD: pass taesd_decoder.safetensors.")
    stages = [sum(before < number < after for number in blocks) for before, after in pairwise(convolutions)]
    first, last = layers[convolutions[0]], layers[convolutions[-1]]
    if last[0] != _COLORS:
        raise CheckpointError(
            f"{file.name} writes {last[0]} channels, not {_COLORS} colors: it is an encoder. Pass the decoder, such as "
            "taesd_decoder.safetensors."
        )
    widths = [layers[number][1] for number in convolutions[1:]]
    return {
        "_class_name": "AutoencoderTiny",
        "latent_channels": first[1],
        "out_channels": last[0],
        "num_decoder_blocks": stages,
        "decoder_block_out_channels": widths,
        "num_encoder_blocks": [1] * len(stages),  # the encoder is not used
        "encoder_block_out_channels": widths,
    }
