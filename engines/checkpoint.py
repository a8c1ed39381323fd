"""Find or download a diffusers checkpoint and read what its configs say. Needs neither torch nor diffusers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engines.base import EngineError
from engines.manifest import Context, Latent, NoiseSchedule, Size, Source, sha256_of

_PARTS = ("text_encoder", "unet", "vae")
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")

# The scheduler a checkpoint was published with, under the name requests use.
_SCHEDULERS = {
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "PNDMScheduler": "pndm",
}


class CheckpointError(EngineError):
    """The checkpoint cannot be found, read, or built."""


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder of the SD 1.x family, and the facts its configs hold."""

    folder: Path
    name: str

    def config(self, part: str, file: str = "config.json") -> Mapping[str, Any]:
        path = self.folder / part / file
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: {self.name} is not a whole diffusers checkpoint.") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        return config

    @cached_property
    def latent(self) -> Latent:
        unet, vae = self.config("unet"), self.config("vae")
        downscale = 2 ** (len(vae["block_out_channels"]) - 1)
        return Latent(
            channels=unet["in_channels"],
            downscale=downscale,
            multiple=downscale * 2 ** (len(unet["block_out_channels"]) - 1),
            scaling_factor=vae["scaling_factor"],
        )

    @cached_property
    def context(self) -> Context:
        text = self.config("text_encoder")
        return Context(tokens=text["max_position_embeddings"], width=text["hidden_size"])

    @property
    def size(self) -> Size:
        """The size the model was trained at."""
        side = self.config("unet")["sample_size"] * self.latent.downscale
        return Size(width=side, height=side)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        config = self.config("scheduler", "scheduler_config.json")
        known = {key: value for key, value in config.items() if key in NoiseSchedule.model_fields}
        return NoiseSchedule.model_validate(known)

    @property
    def scheduler(self) -> str:
        """The scheduler of the checkpoint's own pipeline; `pndm`, that of SD 1.x, when we have no table for it."""
        published = self.config("scheduler", "scheduler_config.json").get("_class_name", "")
        return _SCHEDULERS.get(published, "pndm")

    @property
    def source(self) -> Source:
        """The checkpoint's identity: one hash over the hashes of its weight files, in a fixed order."""
        digest = hashlib.sha256()
        for part in _PARTS:
            for path in sorted((self.folder / part).glob("*.safetensors")):
                digest.update(f"{part}/{path.name} {sha256_of(path)}\n".encode())
        return Source(name=self.name, sha256=digest.hexdigest())


def find(model: str, *, revision: str | None = None) -> Checkpoint:
    """Return the checkpoint in folder `model`, or download the one with hub id `model`.

    Raises:
        CheckpointError: there is none, the hub cannot be reached, or its architecture is not one we build.
    """
    folder = Path(model)
    local = folder.is_dir()
    found = Checkpoint(
        folder=folder if local else _download(model, revision),
        name=folder.resolve().name if local else model,
    )
    _refuse_unsupported(found)
    return found


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - a local folder needs no hub client
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    wanted = ["model_index.json", "scheduler/*", "tokenizer/*"]
    wanted += [f"{part}/{pattern}" for part in _PARTS for pattern in ("config.json", "*.safetensors", "*.index.json")]
    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=wanted, ignore_patterns=["*.fp16.*", "*non_ema*", "*ema_only*"]
            )
        )
    except HFValidationError:
        raise CheckpointError(f"{model!r} is neither a folder here nor a hub id such as owner/name.") from None
    except Exception as error:  # the hub client raises many families: HTTP, DNS, offline mode, disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model} could not be downloaded ({reason}): check the name and the network, "
            "or pass a folder that holds the checkpoint."
        ) from error


def _refuse_unsupported(checkpoint: Checkpoint) -> None:
    index = checkpoint.config(".", "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in _PIPELINES:
        raise CheckpointError(
            f"{checkpoint.name} is a {pipeline}; built are Stable Diffusion 1.x checkpoints (StableDiffusionPipeline)."
        )
    channels = checkpoint.config("unet")["in_channels"]
    if channels != checkpoint.config("vae")["latent_channels"]:
        raise CheckpointError(
            f"{checkpoint.name} has a UNet of {channels} input channels (inpainting or depth); "
            "built are text-to-image UNets."
        )
    for part in _PARTS:
        if not any((checkpoint.folder / part).glob("*.safetensors")):
            raise CheckpointError(
                f"{checkpoint.folder / part} holds no .safetensors weights, and pickled ones can run code: "
                "convert them with diffusers' save_pretrained(safe_serialization=True)."
            )
