"""A diffusers folder: its configs, and the files that its weights are in. Reads no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engines.checkpoints.errors import CheckpointError
from engines.checkpoints.published_scheduler import published_scheduler
from engines.manifest import Context, Latent, NoiseSchedule, Size

# Stems of the weight files of each part that has weights: as safetensors, and pickled.
_WEIGHT_STEMS = {
    "text_encoder": ("model", "pytorch_model"),
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
}
PARTS = tuple(_WEIGHT_STEMS)  # those that have weights
# Patterns of every file but weights.
CONFIG_PATTERNS = ("model_index.json", *(f"{part}/config.json" for part in PARTS), "scheduler/*.json", "tokenizer/*")


def weights_name(part: str) -> str:
    """Return the name of the file in folder `part` that diffusers writes its weights to."""
    return f"{_WEIGHT_STEMS[part][0]}.safetensors"


def weight_patterns(parts: Sequence[str] = PARTS, *, pickled: bool) -> tuple[str, ...]:
    """Return patterns of the weight files of `parts`, whole or in shards."""
    suffix = "bin" if pickled else "safetensors"
    stems = [f"{part}/{_WEIGHT_STEMS[part][pickled]}" for part in parts]
    endings = (f".{suffix}", f"-*-of-*.{suffix}", f".{suffix}.index.json")
    return tuple(f"{stem}{ending}" for stem in stems for ending in endings)


def read_json(path: Path, if_missing: str) -> Mapping[str, Any]:
    """Read a config. Raises CheckpointError, with `if_missing` as the reason where there is no such file."""
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {if_missing}.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return config


@dataclass(frozen=True)
class CheckpointConfig:
    """The configs of a diffusers folder with a model of the Stable Diffusion 1.x and 2.x family.

    Its properties raise CheckpointError where a config is missing or cannot be read.
    """

    folder: Path
    name: str

    def read(self, part: str, file: str = "config.json") -> Mapping[str, Any]:
        """Read the config of `part`, a folder of the checkpoint."""
        return read_json(self.folder / part / file, f"{self.name} is not a complete diffusers checkpoint")

    @cached_property
    def latent(self) -> Latent:
        unet, vae = self.read("unet"), self.read("vae")
        downscale = 2 ** (len(vae["block_out_channels"]) - 1)
        return Latent(
            channels=unet["in_channels"],
            downscale=downscale,
            multiple=downscale * 2 ** (len(unet["block_out_channels"]) - 1),
            scaling_factor=vae.get("scaling_factor", 0.18215),  # AutoencoderKL's default: the oldest configs omit it
        )

    @cached_property
    def context(self) -> Context:
        text = self.read("text_encoder")
        return Context(
            tokens=text["max_position_embeddings"],
            width=text["hidden_size"],
            layers=text.get("num_hidden_layers", 12),  # CLIPTextConfig's default
        )

    @property
    def size(self) -> Size:
        """The image size the model was trained at."""
        sample = self.read("unet")["sample_size"]
        height, width = sample if isinstance(sample, list) else (sample, sample)
        return Size(width=width * self.latent.downscale, height=height * self.latent.downscale)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        config = self._scheduler_config()
        known = {key: value for key, value in config.items() if key in NoiseSchedule.model_fields}
        try:
            return NoiseSchedule.model_validate(known)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the schedule"
            raise CheckpointError(
                f"The scheduler config of {self.name} is not supported: {where}: {first['msg']}."
            ) from error

    @property
    def scheduler(self) -> str:
        """The scheduler of the checkpoint's own pipeline, or `pndm`, that of SD 1.x, where it is not supported."""
        return published_scheduler(self._scheduler_config()) or "pndm"

    @property
    def guidance_embedding(self) -> int | None:
        """Width of the guidance embedding that the UNet takes, as in latent consistency models; None without one."""
        width: int | None = self.read("unet").get("time_cond_proj_dim")
        return width

    @property
    def prefers_bf16(self) -> bool:
        """Whether attention scores overflow FP16, as they do in the UNets of SD 2.x."""
        unet = self.read("unet")
        return bool(unet.get("upcast_attention")) or unet["cross_attention_dim"] == 1024

    @property
    def vocabulary(self) -> frozenset[str]:
        """Every token of the tokenizer, in whichever of its files it is defined."""
        files = {path.name: self.read("tokenizer", path.name) for path in (self.folder / "tokenizer").glob("*.json")}
        fast = files.get("tokenizer.json", {})
        decoder = files.get("tokenizer_config.json", {}).get("added_tokens_decoder", {})
        return frozenset(
            (
                *files.get("vocab.json", ()),
                *files.get("added_tokens.json", ()),
                *fast.get("model", {}).get("vocab", ()),
                *(added["content"] for added in (*fast.get("added_tokens", ()), *decoder.values())),
            )
        )

    def weights(self, part: str) -> tuple[Path, ...]:
        """Return the files that `part` is loaded from: safetensors if there are any. No variants (fp16, non_ema)."""
        return self._weights(part, pickled=False) or self._weights(part, pickled=True)

    def pickled(self, part: str) -> bool:
        """Return whether the weights of `part` exist only as pickles."""
        return not self._weights(part, pickled=False) and bool(self._weights(part, pickled=True))

    def files(self) -> tuple[Path, ...]:
        """Return every config and tokenizer file that decides what is exported."""
        tokenizer = sorted((self.folder / "tokenizer").glob("*"))
        return (
            *(self.folder / part / "config.json" for part in PARTS),
            self.folder / "scheduler" / "scheduler_config.json",
            *(path for path in tokenizer if path.suffix in {".json", ".txt"}),
        )

    def _scheduler_config(self) -> Mapping[str, Any]:
        return self.read("scheduler", "scheduler_config.json")

    def _weights(self, part: str, *, pickled: bool) -> tuple[Path, ...]:
        stem, suffix = _WEIGHT_STEMS[part][pickled], "bin" if pickled else "safetensors"
        named = re.compile(rf"{stem}(-\d+-of-\d+)?\.{suffix}(\.index\.json)?")
        return tuple(path for path in sorted((self.folder / part).glob(f"{stem}*")) if named.fullmatch(path.name))
