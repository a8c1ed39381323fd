"""Find or download a checkpoint, refuse what is not built, and read its configs. Needs neither torch nor diffusers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from engines.contract import GraphName
from engines.errors import EngineError
from engines.files import sha256_of
from engines.manifest import Context, Latent, NoiseSchedule, Size, Source
from engines.progress import Progress, Silent, Stage

_SUPPORTED = "built are text-to-image checkpoints of the Stable Diffusion 1.x and 2.x family"
_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
_CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
}
# What a UNet is given beside picture, timestep and prompt, when its config sets one of these.
_CONDITIONS = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type")

# The parts that have weights, and how their files are called: as safetensors, and pickled.
_WEIGHED = {
    "text_encoder": ("model", "pytorch_model"),
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
}
_CONFIGS = ("model_index.json", *(f"{part}/config.json" for part in _WEIGHED), "scheduler/*.json", "tokenizer/*")

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_SD1_CONFIG = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # describes every single file of SD 1.x
_NOBODY = Silent()
_LARGEST_HEADER = 100 * 2**20  # bytes; safetensors' own limit

# The scheduler a checkpoint was published with, under the name requests use.
_SCHEDULERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepScheduler": "dpmpp_{order}m{sde}",
    "DPMSolverSinglestepScheduler": "dpmpp_{order}s",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "kdpm2_ancestral",
    "KDPM2DiscreteScheduler": "kdpm2",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "unipc",
}
_WITHOUT_SIGMAS = ("ddim", "ddpm", "euler_ancestral", "lcm", "pndm", "tcd")  # classes that ignore use_karras_sigmas …
# What solvers may be set to for us to have a table, the class's own choice first. Names of other classes' solvers are
# there, as those mean the class's own.
_SOLVERS: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "DEISMultistepScheduler": {"solver_order": (2,)},
    "DPMSolverMultistepScheduler": {
        "solver_order": (2, 3),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
    },
    "DPMSolverSinglestepScheduler": {
        "solver_order": (2, 3),
        "algorithm_type": ("dpmsolver++", "deis"),
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
    },
    "UniPCMultistepScheduler": {
        "solver_order": (2,),
        "solver_type": ("bh2", "midpoint", "heun", "logrho"),
        "predict_x0": (True,),
    },
}
_WITHOUT_TABLE = ("thresholding", "use_lu_lambdas", "use_flow_sigmas", "disable_corrector")  # when set

Shapes = Mapping[str, tuple[int, ...]]  # a weight file's tensors


class CheckpointError(EngineError):
    """The checkpoint cannot be found, read, or built."""


@dataclass(frozen=True)
class CheckpointConfig:
    """A diffusers folder of the SD 1.x and 2.x family, and the facts its configs hold."""

    folder: Path
    name: str

    def read(self, part: str, file: str = "config.json") -> Mapping[str, Any]:
        return _read_config(self.folder / part / file, f"{self.name} is not a whole diffusers checkpoint")

    @cached_property
    def latent(self) -> Latent:
        unet, vae = self.read("unet"), self.read("vae")
        downscale = 2 ** (len(vae["block_out_channels"]) - 1)
        return Latent(
            channels=unet["in_channels"],
            downscale=downscale,
            multiple=downscale * 2 ** (len(unet["block_out_channels"]) - 1),
            scaling_factor=vae.get("scaling_factor", 0.18215),  # the oldest configs leave it to the class
        )

    @cached_property
    def context(self) -> Context:
        text = self.read("text_encoder")
        return Context(
            tokens=text["max_position_embeddings"],
            width=text["hidden_size"],
            layers=text.get("num_hidden_layers", 12),  # as CLIPTextConfig has it
        )

    @property
    def size(self) -> Size:
        """The size the model was trained at."""
        sample = self.read("unet")["sample_size"]
        height, width = sample if isinstance(sample, list) else (sample, sample)
        return Size(width=width * self.latent.downscale, height=height * self.latent.downscale)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        config = self.read("scheduler", "scheduler_config.json")
        known = {key: value for key, value in config.items() if key in NoiseSchedule.model_fields}
        try:
            return NoiseSchedule.model_validate(known)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the schedule"
            raise CheckpointError(
                f"The scheduler config of {self.name} is not one we have: {where}: {first['msg']}."
            ) from error

    @property
    def scheduler(self) -> str:
        """The scheduler of the checkpoint's own pipeline; `pndm`, that of SD 1.x, when we have no table for it."""
        return _published(self.read("scheduler", "scheduler_config.json")) or "pndm"

    @property
    def guidance_embedding(self) -> int | None:
        """How wide the guidance is embedded that the UNet is told, as in latent consistency models; None: it is not."""
        width: int | None = self.read("unet").get("time_cond_proj_dim")
        return width

    @property
    def prefers_bf16(self) -> bool:
        """Whether attention scores outgrow FP16, as they do in the UNets of SD 2.x."""
        unet = self.read("unet")
        return bool(unet.get("upcast_attention")) or unet["cross_attention_dim"] == 1024

    @property
    def vocabulary(self) -> frozenset[str]:
        """Every token of the tokenizer, whichever files it is kept in."""
        kept = {path.name: self.read("tokenizer", path.name) for path in (self.folder / "tokenizer").glob("*.json")}
        whole = kept.get("tokenizer.json", {})
        noted = kept.get("tokenizer_config.json", {}).get("added_tokens_decoder", {})
        return frozenset(
            (
                *kept.get("vocab.json", ()),
                *kept.get("added_tokens.json", ()),
                *whole.get("model", {}).get("vocab", ()),
                *(added["content"] for added in (*whole.get("added_tokens", ()), *noted.values())),
            )
        )

    def weights(self, part: str) -> tuple[Path, ...]:
        """The files that `part` is loaded from, as safetensors if there are such. Variants (fp16, non_ema) are not."""
        return self._files(part, pickled=False) or self._files(part, pickled=True)

    def pickled(self, part: str) -> bool:
        """Whether the weights of `part` are there, but only as pickles."""
        return not self._files(part, pickled=False) and bool(self._files(part, pickled=True))

    def _files(self, part: str, *, pickled: bool) -> tuple[Path, ...]:
        stem, suffix = _WEIGHED[part][pickled], "bin" if pickled else "safetensors"
        named = re.compile(rf"{stem}(-\d+-of-\d+)?\.{suffix}(\.index\.json)?")
        return tuple(path for path in sorted((self.folder / part).glob(f"{stem}*")) if named.fullmatch(path.name))

    def _configs(self) -> Iterator[Path]:
        for part in _WEIGHED:
            yield self.folder / part / "config.json"
        yield self.folder / "scheduler" / "scheduler_config.json"
        yield from sorted(path for path in (self.folder / "tokenizer").glob("*") if path.suffix in {".json", ".txt"})


def _read_config(path: Path, if_missing: str) -> Mapping[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {if_missing}.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return config


def _published(config: Mapping[str, Any]) -> str | None:
    """Our name for the scheduler of `config`, with its sigmas; None where we have no table for it."""
    kind = config.get("_class_name", "")
    choices = _SOLVERS.get(kind, {})
    solver = {option: config.get(option, known[0]) for option, known in choices.items()}
    odd = [option for option, value in solver.items() if value not in choices[option]]
    if kind not in _SCHEDULERS or odd or any(config.get(option) for option in _WITHOUT_TABLE):
        return None
    sde = "_sde" if solver.get("algorithm_type") == "sde-dpmsolver++" else ""
    name = _SCHEDULERS[kind].format(order=solver.get("solver_order"), sde=sde)
    sigmas = next((kind for kind in ("karras", "exponential", "beta") if config.get(f"use_{kind}_sigmas")), None)
    return name if sigmas is None or name in _WITHOUT_SIGMAS else f"{name}_{sigmas}"


@dataclass(frozen=True)
class Lora:
    """A low-rank change of the weights, and how much of it is wanted."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read FILE or FILE:SCALE, such as `style.safetensors:0.8`. Raises CheckpointError."""
        if text.lower().endswith(".safetensors"):
            return cls(Path(text))
        path, _, scale = text.rpartition(":")
        if not path.lower().endswith(".safetensors"):
            raise CheckpointError(f"{text!r} is no LoRA: write FILE.safetensors or FILE.safetensors:SCALE.")
        try:
            number = float(scale)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise CheckpointError(f"{scale!r} is no scale of a LoRA: write a number, such as {path}:0.8.")
        return cls(Path(path), number)

    def __str__(self) -> str:
        return f"{self.path.name}:{self.scale:g}"


@dataclass(frozen=True)
class LearnedToken:
    """A word that a model was taught by textual inversion: one vector or several in place of a token's own."""

    token: str
    key: str  # of its tensor
    vectors: int
    width: int

    @property
    def tokens(self) -> tuple[str, ...]:
        """One for each vector, named as diffusers does."""
        return (self.token, *(f"{self.token}_{number}" for number in range(1, self.vectors)))

    @property
    def claimed(self) -> tuple[str, ...]:
        """What no other token may be called: its own, and one that would be taken for a further vector."""
        return (*self.tokens, f"{self.token}_{self.vectors}")


@dataclass(frozen=True)
class Embedding:
    """A file of words learned by textual inversion, Gal et al. (2022), and the token that its only word shall have."""

    path: Path
    token: str | None = None  # None: the file's own, or its name where it has none

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read FILE or FILE:TOKEN, such as `cat.safetensors:<cat-toy>`. Raises CheckpointError."""
        if found := re.fullmatch(r"(.+?\.safetensors)(?::(.+))?", text, re.IGNORECASE | re.DOTALL):
            return cls(Path(found[1]), found[2])
        if re.search(rf"({'|'.join(map(re.escape, _PICKLES))})(:|$)", text, re.IGNORECASE):
            raise CheckpointError(
                f"{text!r} is pickled, which can run code: read it where you trust it, with torch.load, and write its "
                "vectors with safetensors.torch.save_file({token: vectors}, FILE.safetensors)."
            )
        raise CheckpointError(f"{text!r} is no embedding: write FILE.safetensors or FILE.safetensors:TOKEN.")

    @cached_property
    def learned_tokens(self) -> tuple[LearnedToken, ...]:
        """What the file teaches, by its header. Raises CheckpointError."""
        shapes, _ = read_header(self.path)
        _refuse_other_embedding(self, shapes)
        own = {key: self.path.stem if key == _NAMELESS else key for key in shapes}
        return tuple(_word(self.token or own[key], key, shape, self.path.name) for key, shape in shapes.items())


@dataclass(frozen=True)
class Decoder:
    """A diffusers `AutoencoderTiny`, whose distilled decoder takes the place of the VAE's."""

    name: str
    folder: Path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return _read_config(self.folder / "config.json", f"{self.name} is no diffusers AutoencoderTiny")

    @property
    def weights(self) -> Path:
        return self.folder / _DECODER_FILES[1]

    @property
    def downscale(self) -> int:
        """Pixels per latent, in each direction."""
        stages = len(self.config.get("num_decoder_blocks", (3, 3, 3, 1)))
        downscale: int = self.config.get("upsampling_scaling_factor", 2) ** (stages - 1)
        return downscale


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint is, before any weight of it is read."""

    name: str
    path: Path  # a diffusers folder, or a single file
    config_folder: Path | None = None  # the diffusers folder whose configs describe a single file; None for a folder
    allow_pickle: bool = False
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    decoder: Decoder | None = None  # None: the VAE's own

    @property
    def single_file(self) -> bool:
        return self.config_folder is not None

    @cached_property
    def config(self) -> CheckpointConfig:
        """What the configs say. Its folder holds the weights too, unless they lie in a single file."""
        return CheckpointConfig(folder=self.config_folder or self.path, name=self.name)

    @cached_property
    def source(self) -> Source:
        """The identity: one hash over the hashes of every file that decides the export, the LoRAs' scales and the
        embeddings' tokens.
        """
        digest = hashlib.sha256()
        for label, path in self._deciding():
            digest.update(f"{label} {sha256_of(path)}\n".encode())
        for lora in self.loras:
            digest.update(f"lora {lora.scale!r} {sha256_of(lora.path)}\n".encode())
        taught = [(embedding.path, word.token) for embedding in self.embeddings for word in embedding.learned_tokens]
        for path, token in taught:
            digest.update(f"embedding {token!r} {sha256_of(path)}\n".encode())
        if self.decoder:
            for file in _DECODER_FILES:
                digest.update(f"decoder {file} {sha256_of(self.decoder.folder / file)}\n".encode())
        return Source(
            name=self.name,
            sha256=digest.hexdigest(),
            loras=tuple(map(str, self.loras)),
            embeddings=tuple(f"{path.name}:{token}" for path, token in taught),
            decoder=self.decoder.name if self.decoder else None,
        )

    @property
    def learned_tokens(self) -> tuple[LearnedToken, ...]:
        """What the embeddings teach, in the order in which the tokenizer learns it."""
        return tuple(word for embedding in self.embeddings for word in embedding.learned_tokens)

    @property
    def weights(self) -> tuple[Path, ...]:
        """Every file that holds weights."""
        if self.single_file:
            return (self.path,)
        return tuple(path for part in _WEIGHED for path in self.config.weights(part))

    def _deciding(self) -> Iterator[tuple[str, Path]]:
        config = self.config
        for path in (*self.weights, *config._configs()):
            inside = path.is_relative_to(config.folder)
            yield path.relative_to(config.folder).as_posix() if inside else "file", path


def find_checkpoint(  # noqa: PLR0913 - what a checkpoint is built from, by keyword
    model: str,
    *,
    revision: str | None = None,
    config: str | None = None,
    allow_pickle: bool = False,
    loras: Sequence[Lora] = (),
    embeddings: Sequence[Embedding] = (),
    decoder: str | None = None,
    progress: Progress = _NOBODY,
) -> Checkpoint:
    """Find the checkpoint in folder or file `model`, or download the one with hub id `model`.

    A single file needs `config`, the folder or hub id of a checkpoint whose configs describe it; for SD 1.x there is
    a default. `revision` is the hub's: the model's, or that of `config` for a single file. `decoder` is the folder or
    hub id of what decodes in place of the VAE.

    Raises:
        CheckpointError: there is none, the hub cannot be reached, its architecture is not one we build, or a LoRA, an
            embedding or the decoder is not for it.
    """
    for lora in loras:
        _refuse_lora(lora.path)
    _refuse_same_tokens(embeddings)
    path = Path(model)
    wanted = _FindOptions(
        revision,
        config,
        allow_pickle,
        tuple(loras),
        tuple(embeddings),
        decoder=_find_decoder(decoder, progress) if decoder else None,
        progress=progress,
    )
    if path.suffix.lower() in {".safetensors", *_PICKLES} and not path.is_dir():
        return _single_file(path, wanted)
    if path.is_file():
        raise CheckpointError(f"{path} is no checkpoint: pass a diffusers folder, a hub id or a .safetensors file.")
    if config:
        raise CheckpointError(f"--config describes a single file, and {model} is none: leave it out.")
    return _folder(path, wanted) if path.is_dir() else _hub(model, wanted)


@dataclass(frozen=True)
class _FindOptions:
    """What `find` was asked for, beside the model."""

    revision: str | None
    config: str | None
    allow_pickle: bool
    loras: tuple[Lora, ...]
    embeddings: tuple[Embedding, ...]
    decoder: Decoder | None
    progress: Progress

    def checkpoint(self, name: str, path: Path, config: Path | None = None) -> Checkpoint:
        return Checkpoint(
            name=name,
            path=path,
            config_folder=config,
            allow_pickle=self.allow_pickle,
            loras=self.loras,
            embeddings=self.embeddings,
            decoder=self.decoder,
        )


def _folder(path: Path, wanted: _FindOptions) -> Checkpoint:
    checkpoint = wanted.checkpoint(path.resolve().name, path)
    _refuse_unsupported(checkpoint)
    _refuse_weights(checkpoint.config, wanted)
    return checkpoint


def _hub(model: str, wanted: _FindOptions) -> Checkpoint:
    """Download the configs, and only after they are found to be ours the gigabytes, of the same commit."""
    folder = _download(model, _CONFIGS, revision=wanted.revision, progress=wanted.progress)
    checkpoint = wanted.checkpoint(model, folder)
    _refuse_unsupported(checkpoint)
    _download(model, _weight_patterns(pickled=False), revision=folder.name, progress=wanted.progress)
    bare = [part for part in _WEIGHED if not checkpoint.config.weights(part)]
    if bare and not wanted.allow_pickle:
        raise CheckpointError(
            f"{model} has no .safetensors weights for {', '.join(bare)}. If it has pickled ones, which can run code, "
            "pass --allow-pickle to read them as bare tensors, or --revision with a branch that has .safetensors."
        )
    if bare:
        _download(model, _weight_patterns(pickled=True, parts=bare), revision=folder.name, progress=wanted.progress)
    _refuse_weights(checkpoint.config, wanted)
    return checkpoint


def _weight_patterns(*, pickled: bool, parts: Sequence[str] = tuple(_WEIGHED)) -> list[str]:
    suffix = "bin" if pickled else "safetensors"
    stems = [f"{part}/{_WEIGHED[part][pickled]}" for part in parts]
    ends = (f".{suffix}", f"-*-of-*.{suffix}", f".{suffix}.index.json")
    # The index is there already; the hub client remarks on patterns that match nothing.
    return ["model_index.json", *(f"{stem}{end}" for stem in stems for end in ends)]


def _single_file(path: Path, wanted: _FindOptions) -> Checkpoint:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: check the path.")
    pickled = path.suffix.lower() in _PICKLES
    if pickled:
        _refuse_pickle(str(path), wanted)
    layout = None if pickled else read_layout(path)
    checkpoint = wanted.checkpoint(path.stem, path, _describing(path, layout, wanted))
    _refuse_unsupported(checkpoint)
    if layout:
        check_fit(checkpoint, layout)
    return checkpoint


def _describing(path: Path, layout: Layout | None, wanted: _FindOptions) -> Path:
    """The folder of configs that describe a single file."""
    if wanted.config and Path(wanted.config).is_dir():
        return Path(wanted.config)
    if not wanted.config and layout and layout.version == 2:
        raise CheckpointError(
            f"{path.name} is a Stable Diffusion 2 file, which does not say what its UNet predicts: pass --config with "
            "a diffusers folder or hub id of its kind (768-pixel models predict v, 512-pixel ones the noise)."
        )
    model = wanted.config or _SD1_CONFIG
    try:
        return _download(model, _CONFIGS, revision=wanted.revision, progress=wanted.progress)
    except CheckpointError as error:
        raise CheckpointError(
            f"The configs that describe {path.name} are missing. {error} "
            "Pass --config DIR, a diffusers folder of the same architecture."
        ) from error


# --- the hub


def _download(model: str, patterns: Sequence[str], *, revision: str | None, progress: Progress) -> Path:
    """Bring the files of hub repository `model` that match `patterns` into the hub's cache, and return their folder."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - a local folder needs no hub client

    try:
        with progress.stage(f"downloading {model}") as stage:
            folder = snapshot_download(
                model,
                revision=revision,
                allow_patterns=list(patterns),
                tqdm_class=_counting(stage),
                token=os.environ.get("HF_TOKEN") or False,  # False: none, not even one that lies on disk
            )
    except Exception as error:  # the hub client raises many families: HTTP, DNS, offline mode, disk
        raise CheckpointError(_why_not_downloaded(model, revision, error)) from error
    return Path(folder)


def _why_not_downloaded(model: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import errors as hub  # noqa: PLC0415 - as above

    if isinstance(error, hub.HFValidationError):
        return f"{model!r} is neither a folder here nor a hub id such as owner/name."
    if isinstance(error, hub.RevisionNotFoundError):
        return f"{model} has no revision {revision!r}: check the name of the branch, tag or commit."
    if isinstance(error, hub.RepositoryNotFoundError):  # and, among its kind, GatedRepoError
        return (
            f"{model} could not be downloaded: the hub has no such model, or not for you. Check the name; for a "
            "private or gated model set HF_TOKEN in the environment."
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{model} could not be downloaded ({reason}): check the name and the network, "
        "or pass a folder that holds the checkpoint."
    )


def _counting(stage: Stage) -> type:
    """A progress bar for the hub client that shows nothing and tells `stage` of bytes written to disk."""
    from huggingface_hub.utils import tqdm  # noqa: PLC0415 - as above

    lock = threading.Lock()  # files are downloaded by several threads

    class Counting(tqdm):  # type: ignore[misc]  # the client ships no types
        def __init__(self, *args: Any, name: str = "", **options: Any) -> None:
            # The client makes a bar of files, one of bytes from the network (`….transfer`) and one of bytes on disk.
            self.counts = options.get("unit") == "B" and not name.endswith(".transfer")
            super().__init__(*args, **(options | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            with lock:
                self.n += n or 0
                if self.counts:
                    stage.update(self.n, self.total or self.n)

    return Counting


# --- what we do not build


def _refuse_unsupported(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    index = config.read(".", "model_index.json")
    if (pipeline := index.get("_class_name")) not in _PIPELINES:
        raise CheckpointError(f"{config.name} is a {pipeline}; {_SUPPORTED} ({_PIPELINES[0]}).")
    for part, classes in _CLASSES.items():
        published = (index.get(part) or [None, None])[1]
        if published not in classes:
            raise CheckpointError(f"{config.name} has a {published} as {part}; {_SUPPORTED} ({classes[0]}).")
    unet = config.read("unet")
    _refuse_channels(config.name, unet["in_channels"], config.read("vae")["latent_channels"])
    for key in _CONDITIONS:
        if (value := unet.get(key)) is not None:
            raise CheckpointError(
                f"{config.name} has a UNet with {key} {value!r}, an input we do not give; {_SUPPORTED}."
            )
    if (width := unet["cross_attention_dim"]) != config.context.width:
        raise CheckpointError(
            f"{config.name} is no whole: its UNet reads prompts {width} wide, its text encoder writes "
            f"{config.context.width}. Take both parts from the same checkpoint."
        )
    for embedding in checkpoint.embeddings:
        _refuse_misfit(embedding, config)
    if checkpoint.decoder:
        _refuse_decoder(checkpoint.decoder, config)


def _refuse_channels(name: str, channels: int, latent: int) -> None:
    kind = {9: "inpainting", 5: "depth-to-image", 7: "upscaling", 8: "editing by instruction"}
    if channels != latent:
        purpose = kind.get(channels, "more than a latent")
        raise CheckpointError(f"{name} has a UNet of {channels} input channels ({purpose}); {_SUPPORTED}.")


def _refuse_weights(config: CheckpointConfig, wanted: _FindOptions) -> None:
    for part in _WEIGHED:
        folder = config.folder / part
        if not config.weights(part):
            raise CheckpointError(_absent(folder, part))
        if config.pickled(part):
            _refuse_pickle(str(folder), wanted)


def _absent(folder: Path, part: str) -> str:
    wanted = f"{_WEIGHED[part][0]}.safetensors"
    if other := next(folder.glob("*.safetensors"), None):
        return f"{folder} holds {other.name} but no {wanted}: if those are the weights to build from, rename the file."
    return f"{folder} holds no .safetensors weights: the checkpoint is not whole. Download {part}/{wanted}."


def _refuse_pickle(what: str, wanted: _FindOptions) -> None:
    if not wanted.allow_pickle:
        raise CheckpointError(
            f"{what} holds no .safetensors weights, and pickled ones can run code: convert them with diffusers' "
            "save_pretrained(safe_serialization=True), or pass --allow-pickle to read them as bare tensors."
        )
    wanted.progress.note(f"{what}: reading pickled weights, as bare tensors only. Use .safetensors where you can.")


# --- single files


@dataclass(frozen=True)
class Layout:
    """What a single file holds: Stable Diffusion in the layout of its first release."""

    version: int  # 1 or 2, by the text encoder
    channels: int  # the UNet's input
    width: int  # the prompts'
    tensors: int  # the UNet's


def read_layout(path: Path) -> Layout:
    """Recognise a .safetensors file by the shapes in its header. Raises CheckpointError for what we do not build."""
    return layout_of(path.name, read_header(path)[0])


def layout_of(name: str, shapes: Shapes) -> Layout:
    """Recognise a single file by its tensors. Raises CheckpointError for what we do not build."""
    for sign, kind in _SIGNS.items():
        if any(re.match(sign, key) for key in shapes):
            raise CheckpointError(f"{name} is {kind}; {_SUPPORTED}.")
    unet = "model.diffusion_model."
    parts = {unet: "UNet", "first_stage_model.": "VAE", "cond_stage_model.": "text encoder"}
    missing = [part for prefix, part in parts.items() if not any(key.startswith(prefix) for key in shapes)]
    denoising = [key for key in shapes if key.startswith(unet)]
    widths = [shapes[key][-1] for key in denoising if key.endswith(".attn2.to_k.weight")]
    entrance = shapes.get(f"{unet}input_blocks.0.0.weight")
    if len(missing) == len(parts) or (not missing and not (widths and entrance)):
        raise CheckpointError(f"{name} is no checkpoint that we know; {_SUPPORTED}.")
    if missing:
        raise CheckpointError(f"{name} holds no {' and no '.join(missing)}: pass a file that holds all three parts.")
    open_clip = any(key.startswith("cond_stage_model.model.") for key in shapes)
    channels = entrance[1] if entrance else 0
    return Layout(version=2 if open_clip else 1, channels=channels, width=widths[0], tensors=len(denoising))


# Names by which other files are recognised, the surest first.
_SIGNS = {
    r".*[._](lora_down|lora_up|lora_A|lora_B|lora|hada_w1_a|lokr_w1)\b": (
        "a LoRA, a change of another checkpoint's weights (pass it with --lora)"
    ),
    r"(control_model|controlnet_cond_embedding|input_hint_block)\.": "a ControlNet",
    r"conditioner\.embedders\.1\.": "a Stable Diffusion XL checkpoint",
    r"conditioner\.embedders\.0\.": "a Stable Diffusion XL refiner",
    r"(model\.diffusion_model\.)?joint_blocks\.": "a Stable Diffusion 3 checkpoint",
    r"(model\.diffusion_model\.)?double_blocks\.": "a Flux checkpoint",
    r"(model\.diffusion_model\.)?(transformer_blocks|blocks|layers)\.0\.": "a diffusion transformer",
    r"model\.diffusion_model\.label_emb\.": "a checkpoint whose UNet needs a class or an image beside the prompt",
    r"model\.diffusion_model\.time_embed\.cond_proj\.": (
        "a latent consistency model in one file (pass it as a diffusers folder)"
    ),
    r"(down_blocks|mid_block|text_model|embeddings|encoder\.down_blocks|decoder\.up_blocks)\.": (
        "one part of a diffusers checkpoint (pass the folder that holds all of them)"
    ),
    r"(encoder|decoder)\.(conv_in|mid)\.": "a VAE alone",
}


def check_fit(checkpoint: Checkpoint, layout: Layout) -> None:
    """Raise CheckpointError unless the configs describe the single file, as far as its layout tells."""
    _refuse_channels(checkpoint.path.name, layout.channels, checkpoint.config.read("vae")["latent_channels"])
    if layout.width != checkpoint.config.context.width:
        raise CheckpointError(
            f"{checkpoint.path.name} reads prompts {layout.width} wide (Stable Diffusion {layout.version}), the "
            f"configs in {checkpoint.config_folder} are for {checkpoint.config.context.width}: pass --config with a "
            "checkpoint of its kind."
        )


def count_parameters(checkpoint: Checkpoint) -> dict[GraphName, int]:
    """How many weights each graph will have, by the files' headers; empty where they are pickled."""
    counts: dict[GraphName, int] = {}
    for path in checkpoint.weights:
        if path.suffix == ".safetensors":
            for key, shape in read_header(path)[0].items():
                name = _graph_of(key if checkpoint.single_file else f"{path.parent.name}.{key}")
                if name:
                    counts[name] = counts.get(name, 0) + math.prod(shape)
    if counts and checkpoint.decoder:
        shapes, _ = read_header(checkpoint.decoder.weights)
        counts["decode"] = sum(math.prod(shape) for key, shape in shapes.items() if key.startswith("decoder."))
    return counts


def _graph_of(key: str) -> GraphName | None:
    return next((name for sign, name in _READERS.items() if re.match(sign, key)), None)


# Which graph a weight goes into, by its name in a single file or behind its part's in a folder.
_READERS: Mapping[str, GraphName] = {
    r"(text_encoder|cond_stage_model)\.": "encode_prompt",
    r"(unet|model\.diffusion_model)\.": "denoise",
    r"(vae|first_stage_model)\.(decoder|post_quant_conv)\.": "decode",
    r"(vae|first_stage_model)\.(encoder|quant_conv)\.": "encode_image",
}


def read_header(path: Path) -> tuple[Shapes, Mapping[str, str]]:
    """The shapes of a .safetensors file's tensors, and its metadata, without its weights. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length) if length <= _LARGEST_HEADER else "")
        metadata: dict[str, str] = header.pop("__metadata__", {})
        return {name: tuple(tensor["shape"]) for name, tensor in header.items()}, metadata
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: check the path.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{path} is no .safetensors file, or a damaged one: download it again.") from None


def _refuse_lora(path: Path) -> None:
    """What a LoRA's names tell. Whether its shapes fit is seen when it is fused."""
    shapes, _ = read_header(path)
    for sign, kind in _LORA_SIGNS.items():
        if any(re.search(sign, key) for key in shapes):
            raise CheckpointError(f"{path.name} is {kind}; fused are LoRAs for Stable Diffusion 1.x and 2.x.")
    if not any("lora" in key for key in shapes):
        raise CheckpointError(f"{path.name} is not a LoRA: none of its tensors is named like one.")


_LORA_SIGNS = {
    r"^lora_te[12]_|^text_encoder_2\.|^lora_unet_(input|output)_blocks_": "a LoRA for Stable Diffusion XL",
    r"^lora_te3_|^(transformer|text_encoder_3)\.|^lora_unet_(double|single|joint)_blocks_": (
        "a LoRA for a diffusion transformer (Stable Diffusion 3, Flux)"
    ),
    r"\.hada_": "a LoHa, not a LoRA",
    r"\.lokr_": "a LoKr, not a LoRA",
    r"dora_scale|lora_magnitude_vector": "a DoRA, which scales weights too",
    r"\.lora_mid\.": "a LoRA in three factors",
}


# --- decoders

_DECODER_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


def _find_decoder(decoder: str, progress: Progress) -> Decoder:
    """The decoder in folder `decoder`, or the one with that hub id, downloaded once its config is found to be ours."""
    path = Path(decoder)
    if path.is_dir():
        found = Decoder(name=path.resolve().name, folder=path)
        _refuse_other_decoder(found)
    else:
        found = Decoder(name=decoder, folder=_download(decoder, _DECODER_FILES[:1], revision=None, progress=progress))
        _refuse_other_decoder(found)
        _download(decoder, _DECODER_FILES, revision=found.folder.name, progress=progress)
    if not found.weights.is_file():
        raise CheckpointError(
            f"{found.name} has no {found.weights.name}: take a decoder that has, or write the file with diffusers' "
            "AutoencoderTiny.save_pretrained(safe_serialization=True)."
        )
    read_header(found.weights)
    return found


def _refuse_other_decoder(decoder: Decoder) -> None:
    if (kind := decoder.config.get("_class_name")) != "AutoencoderTiny":
        raise CheckpointError(
            f"{decoder.name} is of kind {kind}; what decodes in place of the VAE is an AutoencoderTiny, such as "
            "madebyollin/taesd."
        )


def _refuse_decoder(decoder: Decoder, config: CheckpointConfig) -> None:
    """Raise CheckpointError where the decoder reads other latents than this model makes, as far as its config tells."""
    latent = config.latent
    channels, colors = decoder.config.get("latent_channels", 4), decoder.config.get("out_channels", 3)
    if (channels, decoder.downscale, colors) != (latent.channels, latent.downscale, 3):
        raise CheckpointError(
            f"{decoder.name} makes {colors} colours of {channels} channels at {decoder.downscale} pixels a latent, "
            f"{config.name} has {latent.channels} channels at {latent.downscale}: take a decoder of its kind."
        )


# --- embeddings

_NAMELESS = "emb_params"  # the tensor of a file that does not say which token it is for, as AUTOMATIC1111 writes them
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "Stable Diffusion XL"}


def _refuse_other_embedding(embedding: Embedding, shapes: Shapes) -> None:
    """What the file's names tell. Whether it fits the model is seen once that is found."""
    name = embedding.path.name
    if {"clip_l", "clip_g"} & shapes.keys():
        raise CheckpointError(
            f"{name} is an embedding for Stable Diffusion XL, with vectors for two text encoders (clip_l, clip_g); "
            "added are those for Stable Diffusion 1.x and 2.x."
        )
    if not shapes or any(re.search(r"\.(weight|bias|alpha)$", key) for key in shapes):
        raise CheckpointError(f"{name} is no embedding of textual inversion: none of its tensors is named for a token.")
    if embedding.token and len(shapes) > 1:
        raise CheckpointError(
            f"{name} holds {len(shapes)} words, which have tokens of their own ({', '.join(shapes)}): "
            f"leave out {embedding.token!r}, or write each to a file of its own."
        )


def _word(token: str, key: str, shape: tuple[int, ...], name: str) -> LearnedToken:
    """The word of a tensor [D] or [n, D]. Raises CheckpointError where it is none."""
    if len(shape) not in {1, 2} or 0 in shape:
        raise CheckpointError(f"{name} is no embedding of textual inversion: {key} is of shape {list(shape)}.")
    if not re.fullmatch(r"\S+", token):
        raise CheckpointError(f"{token!r} is no token, which is one word without spaces: name one with {name}:TOKEN.")
    return LearnedToken(token=token, key=key, vectors=shape[0] if len(shape) == 2 else 1, width=shape[-1])


def _refuse_same_tokens(embeddings: Sequence[Embedding]) -> None:
    """Case tells no tokens apart: prompts are read in lower case."""
    claims: dict[str, str] = {}
    for embedding in embeddings:
        name = embedding.path.name
        for word in embedding.learned_tokens:
            for token in dict.fromkeys(token.lower() for token in word.claimed):
                if token in claims:
                    raise CheckpointError(
                        f"{claims[token]} and {name} have tokens that prompts cannot tell apart ({token}): "
                        f"name another with {name}:TOKEN."
                    )
                claims[token] = name


def _refuse_misfit(embedding: Embedding, config: CheckpointConfig) -> None:
    """Raise CheckpointError for a word that this model's tokenizer or text encoder cannot learn."""
    name, context = embedding.path.name, config.context
    vocabulary = config.vocabulary
    for word in embedding.learned_tokens:
        if word.width != context.width:
            made = f"made for {_WIDTHS[word.width]}, " if word.width in _WIDTHS else ""
            raise CheckpointError(
                f"{name} does not fit {config.name}: {made}{word.width} wide, and this model's text encoder is "
                f"{context.width}."
            )
        if word.vectors > context.tokens - 2:  # beside start and end
            raise CheckpointError(
                f"{name} has {word.vectors} vectors for {word.token}, and a prompt has room for {context.tokens - 2}."
            )
        if taken := next((token for token in word.claimed if token in vocabulary), None):
            raise CheckpointError(
                f"{taken} of {name} is a token that {config.name} has already: name another with {name}:TOKEN."
            )
