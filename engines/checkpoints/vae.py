"""A VAE that replaces the checkpoint's own, in a file or a diffusers folder. Reads no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.checkpoints.diffusers_folder import CheckpointConfig, read_json
from engines.errors import CheckpointError
from engines.safetensors_header import read_header

_PREFIX = "first_stage_model."
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_LDM = re.compile(r"(encoder|decoder)\.(conv_in|down|up|mid|(conv_)?norm_out|conv_out)\.|(post_)?quant_conv\.")
_DIFFUSERS = re.compile(r"(encoder|decoder)\.(down_blocks|up_blocks|mid_block)\.")


@dataclass(frozen=True)
class Vae:
    """An `AutoencoderKL`: its weights, and its config where it is a folder."""

    name: str
    weights: Path
    config: Path | None = None  # None: a file in the first release's layout, which the checkpoint's config describes

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.weights, self.config) if self.config else (self.weights,)

    @property
    def force_upcast(self) -> bool | None:
        """Whether it leaves the range of FP16; None where no config tells."""
        if self.config is None:
            return None
        return bool(read_json(self.config, "the VAE is incomplete").get("force_upcast", True))


def find_vae(text: str) -> Vae:
    """Find a VAE in a file, or in a diffusers folder that is or holds one.

    Raises:
        CheckpointError: there is none, or it is of another kind.
    """
    path = Path(text)
    if path.is_dir():
        return _in_folder(path / "vae" if (path / "vae").is_dir() else path)
    if path.suffix.lower() != ".safetensors":
        remedy = "convert it to .safetensors where you trust it" if path.is_file() else "pass a folder or a file"
        raise CheckpointError(f"--vae {text} is neither a .safetensors file nor a folder: {remedy}.")
    shapes, _ = read_header(path)
    if any(_DIFFUSERS.match(key) for key in shapes):
        if path.name == _WEIGHTS and path.with_name("config.json").is_file():
            return _in_folder(path.parent)
        raise CheckpointError(
            f"{path.name} is a VAE in diffusers' layout without its config.json: pass the folder that holds both."
        )
    names = [name for key in shapes if (name := vae_name(key))]
    if not any(".decoder." in name for name in names) or not any(".encoder." in name for name in names):
        raise CheckpointError(
            f"{path.name} is not a VAE: it holds no encoder and decoder. A decoder alone, such as TAESD, is passed "
            "with --decoder."
        )
    return Vae(path.stem, path)


def _in_folder(folder: Path) -> Vae:
    config = read_json(folder / "config.json", f"{folder} is not a diffusers AutoencoderKL")
    if (kind := config.get("_class_name")) != "AutoencoderKL":
        raise CheckpointError(f"{folder} is of class {kind}, and --vae takes an AutoencoderKL.")
    weights = folder / _WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{folder} holds no {_WEIGHTS}: download it to that folder.")
    read_header(weights)  # refuses a damaged file
    return Vae(folder.resolve().name, weights, folder / "config.json")


def check_vae_fits(vae: Vae, config: CheckpointConfig) -> None:
    """Raise CheckpointError unless the VAE's latents are those of the model, as far as its config or shapes show."""
    own = _facts(config.read("vae"))
    if vae.config:
        found = _facts(read_json(vae.config, "the VAE is incomplete"))
    else:
        shapes = {vae_name(key): shape for key, shape in read_header(vae.weights)[0].items()}
        kernel = shapes.get(f"{_PREFIX}decoder.conv_in.weight") or (0, 0)
        found = {"latent_channels": kernel[1]}
    for key, value in found.items():
        if value != own[key]:
            raise CheckpointError(
                f"{vae.name} does not fit {config.name}: its {key} is {value}, the model's {own[key]}. Pass a VAE made "
                "for this kind of model."
            )


def _facts(config: Mapping[str, Any]) -> dict[str, object]:
    """What the latents depend on; the defaults are AutoencoderKL's."""
    return {
        "latent_channels": config.get("latent_channels", 4),
        "number of blocks": len(config.get("block_out_channels") or (64,)),
        "scaling_factor": config.get("scaling_factor", 0.18215),
    }


def vae_name(key: str) -> str | None:
    """The name of a VAE's tensor in a whole checkpoint; None where it is no part of the VAE."""
    bare = key.removeprefix(_PREFIX)
    return f"{_PREFIX}{bare}" if _LDM.match(bare) or _DIFFUSERS.match(bare) else None
