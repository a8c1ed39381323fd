"""What a manifest is made of: files, sizes, schedules, graphs and builds, each with its bounds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, StringConstraints, model_validator

from engines.contract import GRAPHS, MAX_CHUNKS, GraphName, TensorSpec
from engines.files import sha256_of

_CACHED_CHUNKS = 32  # embeddings that may outlive their requests
_LONGEST_SIDE = 8192  # pixels, as in requests
_MOST_ROWS = 1024
_WIDEST = 65536  # of a fixed dimension
_MOST_TIMESTEPS = 10_000  # models are trained on 1000
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
SPECIAL_TOKENS = 2  # of a chunk: its begin and its end

Storage = Literal["fp32", "fp16"]  # how weights lie on disk
ComputeDtype = Literal["fp32", "fp16", "bf16"]  # what an ONNX graph computes in
Precision = Literal["fp32", "fp16", "bf16", "fp8", "int8"]  # what an engine computes in


class Frozen(BaseModel):
    """A part of the manifest. Unknown fields, NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _inside_bundle(path: str) -> str:
    parts = PurePosixPath(path)
    if not path or "\\" in path or parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{path!r} leaves the bundle's folder")
    if str(parts) != path or path == ".":
        raise ValueError(f"{path!r} is not the plain path of a file, as in onnx/decode.onnx")
    return path


def _without_controls(text: str) -> str:
    if _CONTROLS.search(text):
        raise ValueError(f"{text!r} has control characters")
    return text


Word = Annotated[
    str, StringConstraints(max_length=200), AfterValidator(_without_controls)
]  # a name in a message or a path
Side = Annotated[int, Field(gt=0, le=_LONGEST_SIDE)]
Rows = Annotated[int, Field(gt=0, le=_MOST_ROWS)]
Beta = Annotated[float, Field(gt=0, lt=1)]


class File(Frozen):
    """One file of the bundle. `path` is relative to the manifest, with forward slashes."""

    path: Annotated[Word, AfterValidator(_inside_bundle)]
    size: int = Field(ge=0, lt=2**63, description="bytes")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @classmethod
    def of(cls, path: Path, *, root: Path) -> Self:
        """The file at `path`, named relative to `root`."""
        return cls(path=path.relative_to(root).as_posix(), size=path.stat().st_size, sha256=sha256_of(path))


Files = Annotated[tuple[File, ...], Field(min_length=1, max_length=1000)]


class Size(Frozen):
    """An image size in pixels."""

    width: Side
    height: Side

    def __hash__(self) -> int:
        """The hash of pydantic, in a third of the time: every step looks things up by size."""
        return hash((self.width, self.height))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class NoiseSchedule(Frozen):
    """The fields of a checkpoint's `scheduler_config.json` that schedulers share; None is a scheduler's own default.

    The names and meanings are those of diffusers' scheduler configs.
    """

    num_train_timesteps: int = Field(default=1000, gt=0, le=_MOST_TIMESTEPS)
    beta_start: Beta = 0.00085
    beta_end: Beta = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    trained_betas: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    steps_offset: int = Field(default=0, ge=0, le=_MOST_TIMESTEPS)
    set_alpha_to_one: bool | None = None
    skip_prk_steps: bool = True
    final_sigmas_type: Literal["zero", "sigma_min"] | None = None
    rescale_betas_zero_snr: bool = False

    @model_validator(mode="after")
    def _one_beta_per_timestep(self) -> Self:
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(f"{len(self.trained_betas)} trained_betas for {self.num_train_timesteps} timesteps")
        return self

    @model_validator(mode="after")
    def _betas_ascend(self) -> Self:
        if self.trained_betas is None and self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start} is above beta_end {self.beta_end}")
        return self

    @model_validator(mode="after")
    def _offset_is_a_timestep(self) -> Self:
        if self.steps_offset >= self.num_train_timesteps:
            raise ValueError(f"steps_offset {self.steps_offset} leaves none of {self.num_train_timesteps} timesteps")
        return self


class Latent(Frozen):
    """The space the UNet works in: [channels, height / downscale, width / downscale]."""

    channels: int = Field(gt=0, le=256)
    downscale: int = Field(gt=0, le=256, description="pixels per latent, in each direction")
    multiple: Side = Field(description="image sides are multiples of this many pixels")
    scaling_factor: float = Field(description="scales the VAE's latents to unit variance; the graphs apply it")

    @model_validator(mode="after")
    def _whole_latents(self) -> Self:
        if self.multiple % self.downscale:
            raise ValueError(f"multiple {self.multiple} is not a multiple of downscale {self.downscale}")
        return self


class Context(Frozen):
    """The embeddings of one chunk of a prompt: [tokens, width]."""

    tokens: int = Field(gt=SPECIAL_TOKENS, le=4096)
    width: int = Field(gt=0, le=65536)
    layers: int = Field(
        gt=0,
        le=1024,
        description="layers of the text encoder that a prompt goes through; clip_skip leaves out some of the last",
    )
    force_zeros_for_empty_prompt: bool = Field(
        default=False, description="whether the embeddings of an empty negative prompt are zeros, as in diffusers"
    )


class Tokenizer(Frozen):
    """The prompt tokenizer as one `tokenizer.json`, and the token that fills a prompt up to the context's length."""

    file: File
    pad: int = Field(ge=0, lt=2**31)
    pad_2: int | None = Field(
        default=None,
        ge=0,
        lt=2**31,
        description="what the second text encoder's prompts are filled up with; None: there is one text encoder",
    )
    embeddings: dict[Word, PositiveInt] = Field(
        default={},
        max_length=10_000,
        description="tokens learned by textual inversion, and the number of vectors of each: the token itself, then "
        "token_1, token_2 …",
    )


class Defaults(Frozen):
    """Values of request fields that are left out: those the checkpoint looks best with."""

    scheduler: Word
    num_inference_steps: int = Field(default=50, gt=0, le=1000)
    guidance_scale: float = Field(default=7.5, ge=0, le=1000)
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = Field(
        default=None, description="of every scheduler that has one; None: the noise schedule's"
    )
    eta: float | None = Field(default=None, ge=0, le=1, description="of this scheduler alone; None: its own")
    timesteps: tuple[Annotated[int, Field(ge=0, lt=_MOST_TIMESTEPS)], ...] | None = Field(
        default=None,
        max_length=1000,
        description="those it was distilled on, for this scheduler and this many steps; None: the scheduler's",
    )

    @model_validator(mode="after")
    def _one_timestep_per_step(self) -> Self:
        if self.timesteps is not None and len(self.timesteps) != self.num_inference_steps:
            raise ValueError(f"{len(self.timesteps)} timesteps for {self.num_inference_steps} steps")
        return self


class FeatureDrift(Frozen):
    """How far the model's output drifts from what a shallow step computes over features of an earlier noise level.

    It accumulates over the levels: that of features made at one level and reused at another is the difference.
    """

    log_snr: tuple[float, ...] = Field(min_length=2, max_length=1000, description="rising, of signal to noise in power")
    total: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        max_length=1000, description="rising from 0: the summed root mean squares, at each of these levels"
    )

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if len(self.total) != len(self.log_snr):
            raise ValueError(f"{len(self.total)} totals for {len(self.log_snr)} noise levels")
        if any(later <= earlier for earlier, later in pairwise(self.log_snr)):
            raise ValueError("the noise levels of the feature drift do not rise")
        if any(later < earlier for earlier, later in pairwise(self.total)):
            raise ValueError("the totals of the feature drift fall")
        return self


class Difference(Frozen):
    """The error of an output relative to the largest expected value; 0.01 is one per cent."""

    largest: float = Field(ge=0)
    mean: float = Field(ge=0)


class Onnx(Frozen):
    """A graph in one precision. Its weights may lie in a file that several graphs share."""

    files: Files = Field(description="the graph first, then the files of its weights")
    difference: Difference = Field(description="compared with torch in FP32, on random inputs")


class Graph(Frozen):
    """One of the model's graphs. Dimensions that vary are named, those fixed at export are numbers."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    onnx: dict[ComputeDtype, Onnx]
    exceeds_fp16: bool = Field(
        default=False, description="it leaves FP16's range: BF16 or FP32 takes its place where the others are in FP16"
    )

    @model_validator(mode="after")
    def _has_a_reference(self) -> Self:
        if "fp32" not in self.onnx:
            raise ValueError("the graph in fp32, to which others are compared, is missing")
        return self

    def exported_in(self, wanted: ComputeDtype) -> ComputeDtype:
        """The dtype that an export in `wanted` gives."""
        return "bf16" if self.exceeds_fp16 and wanted == "fp16" else wanted


class Profile(Frozen):
    """Shapes that an engine was optimised for: one image size, and up to `batch` rows, images or prompts."""

    size: Size | None = Field(description="None where shapes do not depend on the image size")
    batch: Rows
    activations: int | None = Field(
        default=None, ge=0, description="bytes of device memory; None where the compiler did not report it"
    )


class FusionReport(Frozen):
    """Which layers the compiler fused, in the worst profile; of graphs for ONNX Runtime's CUDA provider, operators."""

    total: int
    attentions: int = Field(description="of the graph")
    fused_attentions: int = Field(description="each one kernel, scores never in memory")
    group_norms: int = Field(description="of the graph")
    fused_group_norms: int = Field(description="each one kernel, with the SiLU behind it if there is one")
    convolutions: int = Field(default=0, description="of the graph; 0 where they were not counted")
    channels_last: int = Field(default=0, description="convolutions that compute images channels last, NHWC")
    precisions: dict[str, int] = Field(
        default={}, description="layers by the type they write: Half, Float, BFloat16 …; empty where it is not known"
    )


class Compiled(Frozen):
    """One graph as a backend loads it."""

    files: Files = Field(description="the file that the backend opens, then those it refers to")
    precision: Precision
    profiles: tuple[Profile, ...] = Field(default=(), max_length=1000, description="empty where any shape is accepted")
    layers: FusionReport | None = None
    key: str = Field(description="a hash over all that decides the engine: it is compiled again where the key differs")
    seconds: float = Field(ge=0, description="of compiling")
    memory: int = Field(ge=0, description="bytes of main memory at the peak of compiling; 0 where it was not measured")
    optimization_level: int | None = Field(
        default=None, ge=0, le=5, description="how long TensorRT searched for fast kernels; None for other compilers"
    )
    reused_timings: int | None = Field(
        default=None,
        ge=0,
        description="timings of kernels that earlier builds left, and this one did not measure again",
    )
    difference: Difference | None = Field(
        default=None,
        description="compared with the FP32 graph in ONNX Runtime, on the model's own trajectory and on noise",
    )
    quantization: Difference | None = Field(
        default=None,
        description="of FP8 and INT8 for TensorRT: what the eight bits alone change, computed on a CPU at the build",
    )


class Gpu(Frozen):
    """The GPU that engines were compiled on, where they run on no other model."""

    name: Word
    compute_capability: str = Field(pattern=r"^\d+\.\d+$")


class Verification(Frozen):
    """The image of a backend compared with that of the FP32 graphs in ONNX Runtime."""

    psnr: float = Field(description="dB; 999 where the images are identical")
    size: Size
    steps: PositiveInt


class Build(Frozen):
    """The engines of one backend."""

    version: Word = Field(description="version of the package that compiled the engines, and which runs them")
    gpu: Gpu | None = None
    engines: dict[GraphName, Compiled]
    verification: Verification | None = Field(default=None, description="None: not yet verified")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if missing := [name for name in GRAPHS if name not in self.engines]:
            raise ValueError(f"the engine of {missing[0]} is missing")
        return self

    @property
    def precision(self) -> Precision:
        """The precision of the denoise graph."""
        return self.engines["denoise"].precision


class Source(Frozen):
    """Where the weights come from: a hub id or file name, the hash of its files, and what was added to them."""

    name: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    file_sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="that of the checkpoint, if it is a single file"
    )
    loras: tuple[str, ...] = Field(default=(), description="file name and scale of each LoRA")
    embeddings: tuple[str, ...] = Field(default=(), description="file name and token of each textual inversion")
    decoder: str | None = Field(default=None, description="the distilled decoder beside the VAE's, if any")


LoraPart = Literal["unet", "text_encoder", "text_encoder_2"]


class LoraLayer(Frozen):
    """A layer that LoRAs update, and where its factors lie within one rank of the LoRA pool."""

    part: LoraPart
    name: Word = Field(description="the module's name within its part, as in diffusers and transformers")
    inputs: Annotated[int, Field(gt=0, le=_WIDEST)]
    outputs: Annotated[int, Field(gt=0, le=_WIDEST)]
    down: Annotated[int, Field(ge=0)] = Field(description="position of the first value of down, which has `inputs`")
    up: Annotated[int, Field(ge=0)] = Field(description="position of the first value of up, which has `outputs`")


def check_factors(layers: Sequence[LoraLayer], *, width: int) -> None:
    """Raise ValueError unless every factor lies within one rank of `width` values, and over no other one.

    Each lies at a multiple of its own width, which divides that of the rank: graphs gather it as one row of a table.
    """
    factors = [(layer.down, layer.inputs, layer.name) for layer in layers]
    factors += [(layer.up, layer.outputs, layer.name) for layer in layers]
    end, before = 0, ""
    for position, size, name in sorted(factors):
        if position % size or width % size or position + size > width:
            raise ValueError(f"the factors of {name} do not lie within one rank of the LoRA pool, of {width} values")
        if position < end:
            raise ValueError(f"the factors of {name} lie over those of {before} in the LoRA pool")
        end, before = position + size, name


class LoraCapacity(Frozen):
    """How many LoRAs the device holds at once."""

    slots: Annotated[int, Field(gt=0, le=1024)] = Field(description="LoRAs of the largest rank")
    rank: Annotated[int, Field(gt=0, le=1024)] = Field(description="the largest of one LoRA")

    @property
    def ranks(self) -> int:
        """Those of the pool: LoRAs of lower ranks take fewer, so more of them fit."""
        return self.slots * self.rank

    @property
    def pool_rows(self) -> int:
        """Ranks, and one that stays zero, for what no LoRA updates: it reads no values of others' LoRAs."""
        return self.ranks + 1

    @property
    def ranks_per_row(self) -> int:
        """The most ranks that update one row: two LoRAs of the largest rank, or more of lower ones."""
        return min(2 * self.rank, self.ranks)


class Geometry(Frozen):
    """The sizes of a model's inputs, which decide shapes, pools and profiles."""

    resolutions: tuple[Size, ...] = Field(min_length=1, max_length=64, description="the first is the default")
    rows: tuple[Rows, ...] = Field(min_length=1, max_length=64, description="row buckets, ascending")
    decode_batch: Rows = Field(default=1, description="images that one call may decode")
    latent: Latent
    context: Context
    lora: LoraCapacity | None = Field(default=None, description="None: requests have no LoRAs of their own")

    @model_validator(mode="after")
    def _rows_ascend(self) -> Self:
        if list(self.rows) != sorted(set(self.rows)):
            raise ValueError("the row buckets do not ascend")
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        for size, times in Counter(self.resolutions).items():
            if times > 1:
                raise ValueError(f"{size} is listed {times} times")
            if size.width % self.latent.multiple or size.height % self.latent.multiple:
                raise ValueError(f"{size} does not fit: width and height must be multiples of {self.latent.multiple}")
        return self

    @property
    def max_rows(self) -> int:
        return self.rows[-1]

    @property
    def slots(self) -> int:
        """Slots in each size's state pool: an image per row, and a spare slot for padding."""
        return self.max_rows + 1

    @property
    def feature_places(self) -> int:
        """Places in each size's feature pool: one per row, and a spare place for padding."""
        return self.max_rows + 1

    @property
    def context_rows(self) -> int:
        """Rows of the context pool: the most chunks for each row of each size, and some that outlive their requests."""
        return self.max_rows * MAX_CHUNKS * len(self.resolutions) + _CACHED_CHUNKS
