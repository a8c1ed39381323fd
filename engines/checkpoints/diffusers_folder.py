"""A diffusers folder: its configs as diffusers' pipeline reads them, and the files of its weights. Reads no weights."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from engines.checkpoints.configs import (
    TOKENIZER_FILES,
    ModelIndex,
    SchedulerConfig,
    TextEncoderConfig,
    TinyVaeConfig,
    UnetConfig,
    VaeConfig,
    parse_config,
)
from engines.checkpoints.families import EVERY_PART, EVERY_TOKENIZER, SECOND_ENCODER, Family, family_of
from engines.checkpoints.published_scheduler import (
    ignored_options,
    noise_schedule,
    published_scheduler,
    unsupported_reason,
)
from engines.errors import CheckpointError
from engines.limits import MAX_SIDE
from engines.manifest import Context, Latent, NoiseSchedule, Size

PARTS = ("text_encoder", "unet", "vae")  # those that have weights in every checkpoint
SAFETY_CHECKER = "safety_checker"
# Stems of the weight files of each part that has weights: as safetensors, and pickled.
_WEIGHT_STEMS = {
    "text_encoder": ("model", "pytorch_model"),
    SECOND_ENCODER: ("model", "pytorch_model"),
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    SAFETY_CHECKER: ("model", "pytorch_model"),
}
# Patterns of every file but weights.
CONFIG_PATTERNS = (
    "model_index.json",
    *(f"{part}/config.json" for part in EVERY_PART),
    "scheduler/*.json",
    *(f"{name}/*" for name in EVERY_TOKENIZER),
)
SAFETY_CONFIGS = (f"{SAFETY_CHECKER}/config.json", "feature_extractor/preprocessor_config.json")
_INDEX, _SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
_MAX_JSON = 64 << 20  # bytes; the largest tokenizers have a tenth of that
# Pipelines of diffusers that correct outdated configs when they are made.
_CORRECTING = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
_CORRECTED_SAMPLE_SIZE = 64  # the size of a UNet that was published with a smaller one, before version 0.9
_Config = TypeVar("_Config", bound=BaseModel)


def weights_name(part: str, variant: str | None = None) -> str:
    """Return the name of the file in folder `part` that diffusers writes its weights to."""
    return f"{_WEIGHT_STEMS[part][0]}.{variant}.safetensors" if variant else f"{_WEIGHT_STEMS[part][0]}.safetensors"


def weight_patterns(parts: Sequence[str] = PARTS, *, pickled: bool, variant: str | None = None) -> tuple[str, ...]:
    """Return patterns of the weight files of `parts`, whole or in shards."""
    suffix, infix = "bin" if pickled else "safetensors", f".{variant}" if variant else ""
    stems = [f"{part}/{_WEIGHT_STEMS[part][pickled]}" for part in parts]
    endings = (
        f"{infix}.{suffix}",
        f"{infix}-*-of-*.{suffix}",
        f"-*-of-*{infix}.{suffix}",
        f".{suffix}.index{infix}.json",
    )
    return tuple(dict.fromkeys(f"{stem}{ending}" for stem in stems for ending in endings))


def variants_among(names: Sequence[str]) -> tuple[str, ...]:
    """Return the variants of weights in a list of paths such as `unet/diffusion_pytorch_model.fp16.safetensors`."""
    stems = "|".join(f"{part}/{stem}" for part in EVERY_PART for stem in sorted(set(_WEIGHT_STEMS[part])))
    named = re.compile(rf"({stems})(-\d+-of-\d+)?\.(?P<variant>\w+?)(-\d+-of-\d+)?\.(safetensors|bin)")
    return tuple(sorted({found["variant"] for name in names if (found := named.fullmatch(name))}))


def read_json(path: Path, if_missing: str) -> Mapping[str, Any]:
    """Read a config. Raises CheckpointError, with `if_missing` as the reason where there is no such file."""
    try:
        content = json.loads(_read_text(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {if_missing}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): download it again.") from error
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else json.dumps(content)[:20]
        raise CheckpointError(f"{path} should hold a JSON object, and holds {kind}: download it again.")
    return content


def _read_text(path: Path) -> str:
    """Read a file of at most `_MAX_JSON` bytes. Raises OSError, ValueError."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is a folder or a device, not a file")
    if about.st_size > _MAX_JSON:
        raise ValueError(f"it has {about.st_size:,} bytes, and a config has far fewer")
    return path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class PartWeights:
    """The files that a part is loaded from."""

    files: tuple[Path, ...] = ()
    variant: str | None = None
    pickled: bool = False


@dataclass(frozen=True)
class CheckpointConfig:
    """The configs of a diffusers folder with a model of one of the supported families.

    They are read as the folder's pipeline in diffusers reads them: with the defaults of its classes, and with the
    corrections that `StableDiffusionPipeline` makes to outdated ones. The properties raise CheckpointError where a
    config is missing or malformed.
    """

    folder: Path
    name: str
    variant: str | None = None  # of the weights, such as fp16; parts without it have their plain weights

    def read(self, part: str, file: str = "config.json") -> Mapping[str, Any]:
        """Read the config of `part`, a folder of the checkpoint."""
        return read_json(self.folder / part / file, f"{self.name} is not a complete diffusers checkpoint")

    @cached_property
    def index(self) -> ModelIndex:
        return self._parsed(ModelIndex, _INDEX)

    @cached_property
    def unet(self) -> UnetConfig:
        return self._parsed(UnetConfig, "unet/config.json")

    @cached_property
    def vae(self) -> VaeConfig | TinyVaeConfig:
        if self.index.class_of("vae") == "AutoencoderTiny":
            return self._parsed(TinyVaeConfig, "vae/config.json")
        return self._parsed(VaeConfig, "vae/config.json")

    @cached_property
    def text_encoder(self) -> TextEncoderConfig:
        return self._parsed(TextEncoderConfig, "text_encoder/config.json")

    @cached_property
    def text_encoder_2(self) -> TextEncoderConfig | None:
        """None for models with one text encoder."""
        return self._parsed(TextEncoderConfig, f"{SECOND_ENCODER}/config.json") if self.has_two_encoders else None

    @property
    def family(self) -> Family:
        return family_of(self.index.pipeline, self.name)

    @property
    def has_two_encoders(self) -> bool:
        return SECOND_ENCODER in self.family.parts

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that have weights, and without which there is no model."""
        return tuple(self.family.parts)

    @cached_property
    def latent(self) -> Latent:
        return Latent(
            channels=self.vae.latent_channels,
            downscale=self.vae.downscale,
            multiple=self.vae.downscale * 2 ** (len(self.unet.block_out_channels) - 1),
            scaling_factor=self.vae.scaling_factor,
        )

    @cached_property
    def context(self) -> Context:
        text, second = self.text_encoder, self.text_encoder_2
        if second is None:
            return Context(tokens=text.max_position_embeddings, width=text.hidden_size, layers=text.num_hidden_layers)
        return Context(
            tokens=text.max_position_embeddings,
            width=text.hidden_size + second.hidden_size,
            layers=min(text.num_hidden_layers, second.num_hidden_layers) - 1,  # all but the last; Podell et al. (2023)
            force_zeros_for_empty_prompt=self.index.force_zeros_for_empty_prompt,
        )

    @property
    def size(self) -> Size:
        """The image size the model was trained at."""
        sample = self.unet.sample_size
        if self._corrects and isinstance(sample, int) and self.unet.precedes_0_9:
            sample = max(sample, _CORRECTED_SAMPLE_SIZE)
        height, width = sample if isinstance(sample, tuple) else (sample, sample)
        if (side := max(height, width) * self.latent.downscale) > MAX_SIDE:
            path = self.folder / "unet" / "config.json"
            raise CheckpointError(
                f"{path}: sample_size {max(height, width)} gives images of {side} pixels: correct it."
            )
        return Size(width=width * self.latent.downscale, height=height * self.latent.downscale)

    @cached_property
    def noise_schedule(self) -> NoiseSchedule:
        config = parse_config(SchedulerConfig, self._scheduler_config, self.folder / _SCHEDULER)
        return noise_schedule(config, self._scheduler_class, corrected=self._corrects)

    @property
    def scheduler(self) -> str:
        """The scheduler of the checkpoint's own pipeline; where it is not supported, one that is."""
        fallback = "ddim" if self.noise_schedule.prediction_type == "sample" else "pndm"
        return published_scheduler(self._scheduler_class, self._scheduler_config) or fallback

    @property
    def not_followed(self) -> tuple[str, ...]:
        """What the configs ask for and latentd does not do: a sentence for each."""
        kind, config = self._scheduler_class, self._scheduler_config
        asked = [f"{_SCHEDULER} asks for {option}" for option in ignored_options(kind, config)]
        if reason := unsupported_reason(kind, config):
            asked.append(f"{_SCHEDULER} asks for {reason}, and requests use {self.scheduler} by default")
        return tuple(f"{one}: this is not followed." for one in asked)

    @property
    def guidance_embedding(self) -> int | None:
        """Width of the guidance embedding that the UNet takes, as in latent consistency models; None without one."""
        return self.unet.time_cond_proj_dim

    @property
    def prefers_bf16(self) -> bool:
        """Whether attention scores overflow FP16, as they do in the UNets of SD 2.x."""
        return self.unet.upcast_attention or self.unet.cross_attention_dim == 1024

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """Every token of the tokenizer, in whichever of its files it is defined."""
        return self._tokens_of("tokenizer")

    def check_complete(self) -> None:
        """Raise CheckpointError where a config that only the end of the build would need is missing or malformed."""
        _ = self.size, self.noise_schedule
        for name in self.family.tokenizers:
            self._check_tokenizer(name)
            if strange := self._tokens_of(name) ^ self.vocabulary:
                raise CheckpointError(
                    f"{self.folder / name} has another vocabulary than {self.folder / 'tokenizer'}, such as "
                    f"{min(strange)!r} in one alone: take both tokenizers from the same checkpoint."
                )

    def _check_tokenizer(self, name: str) -> None:
        folder = self.folder / name
        names = {path.name for path in folder.glob("*") if path.is_file()}
        if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
            raise CheckpointError(
                f"{folder} should hold tokenizer.json, or vocab.json and merges.txt, and holds "
                f"{', '.join(sorted(names)) or 'no files'}: download the tokenizer again."
            )

    def _tokens_of(self, name: str) -> frozenset[str]:
        """Every token of a tokenizer."""
        folder = self.folder / name
        files = {path.name: self.read(name, path.name) for path in sorted(folder.glob("*.json"))}
        return frozenset(
            token
            for file, model in TOKENIZER_FILES.items()
            if file in files
            for token in parse_config(model, files[file], folder / file).tokens
        )

    def part_weights(self, part: str) -> PartWeights:
        """Return the files that `part` is loaded from: those of the variant if there are any, safetensors first."""
        for variant in dict.fromkeys((self.variant, None)):
            for pickled in (False, True):
                if files := self.files_of(part, pickled=pickled, variant=variant):
                    return PartWeights(files, variant, pickled)
        return PartWeights()

    def files_of(self, part: str, *, pickled: bool, variant: str | None) -> tuple[Path, ...]:
        """Return the weight files of `part` in one format and variant; None: the plain ones."""
        patterns = [pattern.partition("/")[2] for pattern in weight_patterns([part], pickled=pickled, variant=variant)]
        named = re.compile("|".join(re.escape(pattern).replace(r"\*", r"\d+") for pattern in patterns))
        return tuple(path for path in sorted((self.folder / part).glob("*")) if named.fullmatch(path.name))

    def weights(self, part: str) -> tuple[Path, ...]:
        """Return the files that `part` is loaded from."""
        return self.part_weights(part).files

    def pickled(self, part: str) -> bool:
        """Return whether the weights of `part` exist only as pickles."""
        return self.part_weights(part).pickled

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants of weights that the folder holds."""
        files = [path for part in self.parts for path in (self.folder / part).glob("*")]
        return variants_among([path.relative_to(self.folder).as_posix() for path in files])

    def files(self) -> tuple[Path, ...]:
        """Return every config and tokenizer file that decides what is exported."""
        tokenizer = [path for name in self.family.tokenizers for path in sorted((self.folder / name).glob("*"))]
        return (
            self.folder / _INDEX,
            *(self.folder / part / "config.json" for part in self.parts),
            self.folder / _SCHEDULER,
            *(path for path in tokenizer if path.suffix in {".json", ".txt"}),
        )

    @property
    def _corrects(self) -> bool:
        return self.index.pipeline in _CORRECTING

    @cached_property
    def _scheduler_config(self) -> Mapping[str, Any]:
        return self.read("scheduler", "scheduler_config.json")

    @property
    def _scheduler_class(self) -> str:
        """The class in diffusers: the one that the index names, and only without one that of the scheduler's config."""
        return self.index.class_of("scheduler") or str(self._scheduler_config.get("_class_name"))

    def _parsed(self, model: type[_Config], file: str) -> _Config:
        content = read_json(self.folder / file, f"{self.name} is not a complete diffusers checkpoint")
        return parse_config(model, content, self.folder / file)
