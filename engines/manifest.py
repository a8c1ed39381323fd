"""`manifest.json`: everything the server knows about a built model, and the proof that its files are the ones built."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from engines.base import EngineError, TensorSpec

MANIFEST = "manifest.json"

GraphName = Literal["encode_prompt", "denoise", "decode", "encode_image"]
GRAPHS: tuple[GraphName, ...] = ("encode_prompt", "denoise", "decode", "encode_image")


class BundleError(EngineError):
    """A bundle is missing, altered, or of a kind this version does not read."""


class _Fact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _inside_bundle(path: str) -> str:
    parts = PurePosixPath(path)
    if not path or "\\" in path or parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{path!r} leaves the bundle's folder")
    return path


class File(_Fact):
    """One file of the bundle. `path` is relative to the manifest, with forward slashes."""

    path: Annotated[str, AfterValidator(_inside_bundle)]
    size: int = Field(ge=0, description="bytes")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @classmethod
    def of(cls, path: Path, *, root: Path) -> Self:
        """Measure the file at `path`, named relative to `root`."""
        return cls(path=path.relative_to(root).as_posix(), size=path.stat().st_size, sha256=sha256_of(path))


class Size(_Fact):
    """A picture's size in pixels."""

    width: PositiveInt
    height: PositiveInt

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class NoiseSchedule(_Fact):
    """What a checkpoint's `scheduler_config.json` says to every scheduler; None leaves it to the scheduler's default.

    The names and meanings are those of diffusers' scheduler configs.
    """

    num_train_timesteps: PositiveInt = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None
    skip_prk_steps: bool = True
    final_sigmas_type: Literal["zero", "sigma_min"] | None = None

    @model_validator(mode="after")
    def _one_beta_per_timestep(self) -> Self:
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(f"{len(self.trained_betas)} trained_betas for {self.num_train_timesteps} timesteps")
        return self


class Latent(_Fact):
    """The space the UNet works in: [channels, height / downscale, width / downscale]."""

    channels: PositiveInt
    downscale: PositiveInt = Field(description="pixels per latent, in each direction")
    multiple: PositiveInt = Field(description="a picture's sides are multiples of this many pixels")
    scaling_factor: float = Field(description="what brings the VAE's latents to unit variance; the graphs apply it")


class Context(_Fact):
    """Prompt embeddings: [tokens, width]."""

    tokens: PositiveInt
    width: PositiveInt


class Tokenizer(_Fact):
    """The prompt tokenizer as one `tokenizer.json`, and the token that fills a prompt up to the context's length."""

    file: File
    pad: int


class Defaults(_Fact):
    """What a request gets for what it leaves out: the values the checkpoint looks best with."""

    scheduler: str
    num_inference_steps: PositiveInt = 50
    guidance_scale: float = 7.5


class Graph(_Fact):
    """One ONNX graph. Dimensions that vary are named, those fixed at export are numbers."""

    files: tuple[File, ...] = Field(min_length=1, description="the graph first, then its weights where they lie apart")
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Source(_Fact):
    """Where the weights came from: a hub id or a folder's name, and the hash over its weight files."""

    name: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Fact):
    """A built model. Read one with `Manifest.load`, which refuses what it cannot vouch for."""

    format: Literal[1] = 1
    name: str = Field(min_length=1, max_length=200)
    source: Source
    backend: str
    precision: Literal["fp32", "fp16"]
    resolutions: tuple[Size, ...] = Field(min_length=1, description="the first is the default")
    rows: tuple[PositiveInt, ...] = Field(min_length=1, description="row buckets, ascending")
    latent: Latent
    context: Context
    tokenizer: Tokenizer
    noise_schedule: NoiseSchedule
    defaults: Defaults
    examples: tuple[str, ...] = Field(default=(), description="prompts that show what the model can do")
    graphs: dict[GraphName, Graph]
    versions: dict[str, str] = Field(description="the packages that made the bundle")

    @model_validator(mode="after")
    def _whole_and_in_order(self) -> Self:
        if missing := [name for name in GRAPHS if name not in self.graphs]:
            raise ValueError(f"the graph {missing[0]} is missing")
        if list(self.rows) != sorted(set(self.rows)):
            raise ValueError("the row buckets do not ascend")
        return self

    @property
    def files(self) -> tuple[File, ...]:
        return (self.tokenizer.file, *(file for graph in self.graphs.values() for file in graph.files))

    @property
    def max_rows(self) -> int:
        return self.rows[-1]

    @classmethod
    def load(cls, bundle: Path) -> Self:
        """Read and verify the bundle in folder `bundle`.

        Raises:
            BundleError: there is no manifest, it is not one of ours, or a file is missing or is not the one built.
        """
        try:
            text = (bundle / MANIFEST).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise BundleError(
                f"{bundle} holds no {MANIFEST}: build a bundle with build_engines.py --out {bundle}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{bundle / MANIFEST} cannot be read: {error}") from error
        try:
            manifest = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the document"
            raise BundleError(
                f"{bundle / MANIFEST} is not a manifest this version reads: {where}: {first['msg']}. Build it again."
            ) from error
        manifest.verify(bundle)
        return manifest

    def verify(self, bundle: Path) -> None:
        """Raise BundleError, naming the file, unless every file is there and is the one that was built."""
        for file in self.files:
            path = bundle / file.path
            if not path.is_file():
                raise BundleError(f"{path} is missing: copy the whole bundle again, or build it again.")
            if path.stat().st_size != file.size or sha256_of(path) != file.sha256:
                raise BundleError(
                    f"{path} is not the file that was built (sha256 differs): it is not loaded. Build again."
                )

    def save(self, bundle: Path) -> None:
        """Write the manifest last and whole: a bundle without one is an unfinished build."""
        write_atomically(bundle / MANIFEST, self.model_dump_json(indent=2).encode() + b"\n")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside, flush to disk, rename: readers see the old file or the new one, never half of one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
