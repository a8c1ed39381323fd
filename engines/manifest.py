"""`manifest.json`: everything the server knows about a built model, with the hashes of its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from engines.contract import (
    GRAPHS,
    GUIDANCE_EMBEDDED,
    MAX_CHUNKS,
    OUTPUTS,
    GraphName,
    Port,
    TensorSpec,
    inputs_of,
    sizes_of,
)
from engines.errors import EngineError
from engines.files import sha256_of, write_atomically

MANIFEST = "manifest.json"
FORMAT: Final = 2  # raised when older bundles can no longer be read
_CACHED_CHUNKS = 32  # embeddings that may outlive their requests

Storage = Literal["fp32", "fp16"]  # how weights lie on disk
ComputeDtype = Literal["fp32", "fp16", "bf16"]  # what an ONNX graph computes in
Precision = Literal["fp32", "fp16", "bf16", "int8"]  # what an engine computes in


class BundleError(EngineError):
    """A bundle is missing, altered, or of a format this version does not read."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _inside_bundle(path: str) -> str:
    parts = PurePosixPath(path)
    if not path or "\\" in path or parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{path!r} leaves the bundle's folder")
    return path


class File(_Frozen):
    """One file of the bundle. `path` is relative to the manifest, with forward slashes."""

    path: Annotated[str, AfterValidator(_inside_bundle)]
    size: int = Field(ge=0, description="bytes")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @classmethod
    def of(cls, path: Path, *, root: Path) -> Self:
        """The file at `path`, named relative to `root`."""
        return cls(path=path.relative_to(root).as_posix(), size=path.stat().st_size, sha256=sha256_of(path))

    def matches(self, path: Path) -> bool:
        """Whether the file at `path` exists and has this size and hash."""
        return path.is_file() and path.stat().st_size == self.size and sha256_of(path) == self.sha256


class Size(_Frozen):
    """An image size in pixels."""

    width: PositiveInt
    height: PositiveInt

    def __hash__(self) -> int:
        """The hash of pydantic, in a third of the time: every step looks things up by size."""
        return hash((self.width, self.height))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class NoiseSchedule(_Frozen):
    """The fields of a checkpoint's `scheduler_config.json` that schedulers share; None is a scheduler's own default.

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
    rescale_betas_zero_snr: bool = False

    @model_validator(mode="after")
    def _one_beta_per_timestep(self) -> Self:
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(f"{len(self.trained_betas)} trained_betas for {self.num_train_timesteps} timesteps")
        return self


class Latent(_Frozen):
    """The space the UNet works in: [channels, height / downscale, width / downscale]."""

    channels: PositiveInt
    downscale: PositiveInt = Field(description="pixels per latent, in each direction")
    multiple: PositiveInt = Field(description="image sides are multiples of this many pixels")
    scaling_factor: float = Field(description="scales the VAE's latents to unit variance; the graphs apply it")


class Context(_Frozen):
    """The embeddings of one chunk of a prompt: [tokens, width]."""

    tokens: PositiveInt
    width: PositiveInt
    layers: PositiveInt = Field(description="layers of the text encoder; clip_skip leaves out some of the last")


class Tokenizer(_Frozen):
    """The prompt tokenizer as one `tokenizer.json`, and the token that fills a prompt up to the context's length."""

    file: File
    pad: int
    embeddings: dict[str, PositiveInt] = Field(
        default={},
        description="tokens learned by textual inversion, and the number of vectors of each: the token itself, then "
        "token_1, token_2 …",
    )


class Defaults(_Frozen):
    """Values of request fields that are left out: those the checkpoint looks best with."""

    scheduler: str
    num_inference_steps: PositiveInt = 50
    guidance_scale: float = 7.5


class Difference(_Frozen):
    """The error of an output relative to the largest expected value; 0.01 is one per cent."""

    largest: float = Field(ge=0)
    mean: float = Field(ge=0)


class Onnx(_Frozen):
    """A graph in one precision. Its weights may lie in a file that several graphs share."""

    files: tuple[File, ...] = Field(min_length=1, description="the graph first, then the files of its weights")
    difference: Difference = Field(description="compared with torch in FP32, on random inputs")


class Graph(_Frozen):
    """One of the model's graphs. Dimensions that vary are named, those fixed at export are numbers."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    onnx: dict[ComputeDtype, Onnx]

    @model_validator(mode="after")
    def _has_a_reference(self) -> Self:
        if "fp32" not in self.onnx:
            raise ValueError("the graph in fp32, to which others are compared, is missing")
        return self


class Profile(_Frozen):
    """Shapes that an engine was optimised for: one image size, and up to `batch` rows, images or prompts."""

    size: Size | None = Field(description="None where shapes do not depend on the image size")
    batch: PositiveInt
    activations: int | None = Field(
        default=None, ge=0, description="bytes of device memory; None where the compiler did not report it"
    )


class FusionReport(_Frozen):
    """Which layers the compiler fused, in the worst profile."""

    total: int
    attentions: int = Field(description="of the graph")
    fused_attentions: int = Field(description="each one kernel, scores never in memory")
    group_norms: int = Field(description="of the graph")
    fused_group_norms: int = Field(description="each one kernel, with the SiLU behind it if there is one")
    precisions: dict[str, int] = Field(description="layers by the type they write: Half, Float, BFloat16 …")


class Compiled(_Frozen):
    """One graph as a backend loads it."""

    files: tuple[File, ...] = Field(
        min_length=1, description="the file that the backend opens, then those it refers to"
    )
    precision: Precision
    profiles: tuple[Profile, ...] = Field(default=(), description="empty where any shape is accepted")
    layers: FusionReport | None = None
    key: str = Field(description="a hash over all that decides the engine: it is compiled again where the key differs")
    seconds: float = Field(ge=0, description="of compiling")
    memory: int = Field(ge=0, description="bytes of main memory at the peak of compiling; 0 where it was not measured")
    difference: Difference | None = Field(
        default=None,
        description="compared with the FP32 graph in ONNX Runtime, on the model's own trajectory and on noise",
    )


class Gpu(_Frozen):
    """The GPU that engines were compiled on, where they run on no other model."""

    name: str
    compute_capability: str = Field(pattern=r"^\d+\.\d+$")


class Verification(_Frozen):
    """The image of a backend compared with that of the FP32 graphs in ONNX Runtime."""

    psnr: float = Field(description="dB; 999 where the images are identical")
    size: Size
    steps: PositiveInt


class Build(_Frozen):
    """The engines of one backend."""

    version: str = Field(description="version of the package that compiled the engines, and which runs them")
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


class Source(_Frozen):
    """Where the weights come from: a hub id or file name, the hash of its files, and what was added to them."""

    name: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    loras: tuple[str, ...] = Field(default=(), description="file name and scale of each LoRA")
    embeddings: tuple[str, ...] = Field(default=(), description="file name and token of each textual inversion")
    decoder: str | None = Field(default=None, description="the distilled decoder that replaces the VAE's, if any")


class Geometry(_Frozen):
    """The sizes of a model's inputs, which decide shapes, pools and profiles."""

    resolutions: tuple[Size, ...] = Field(min_length=1, description="the first is the default")
    rows: tuple[PositiveInt, ...] = Field(min_length=1, description="row buckets, ascending")
    decode_batch: PositiveInt = Field(default=1, description="images that one call may decode")
    latent: Latent
    context: Context

    @model_validator(mode="after")
    def _rows_ascend(self) -> Self:
        if list(self.rows) != sorted(set(self.rows)):
            raise ValueError("the row buckets do not ascend")
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


class Manifest(Geometry):
    """A built model. `Manifest.load` reads one and verifies its files."""

    format: Literal[2] = FORMAT
    name: str = Field(min_length=1, max_length=200)
    source: Source
    weights: Storage
    trained_size: Size
    preview: tuple[tuple[float, ...], ...] = Field(
        min_length=3,
        max_length=3,
        description="approximate colours of a latent: red, green and blue in 0..1, each a weight per latent channel as "
        "the UNet sees it, then a constant",
    )
    tokenizer: Tokenizer
    noise_schedule: NoiseSchedule
    defaults: Defaults
    examples: tuple[str, ...] = Field(default=(), description="prompts that show what the model can do")
    graphs: dict[GraphName, Graph]
    builds: dict[str, Build] = Field(
        default={}, description="by backend; the first is the one the bundle was built for"
    )
    versions: dict[str, str] = Field(description="the packages that exported the graphs")
    export_key: str = Field(
        description="a hash over all that decides the graphs: they are exported again where the key differs"
    )

    @field_validator("format", mode="before")
    @classmethod
    def _is_this_format(cls, value: object) -> object:
        if value != FORMAT:
            raise ValueError(f"the bundle has format {value}, and this version reads format {FORMAT}")
        return value

    @model_validator(mode="after")
    def _has_every_graph(self) -> Self:
        if missing := [name for name in GRAPHS if name not in self.graphs]:
            raise ValueError(f"the graph {missing[0]} is missing")
        for name, graph in self.graphs.items():
            inputs = inputs_of(name, guidance_embedded=self.embeds_guidance)
            _check_ports(f"inputs of the graph {name}", inputs, graph.inputs)
            _check_ports(f"outputs of the graph {name}", OUTPUTS[name], graph.outputs)
        return self

    @model_validator(mode="after")
    def _previews_every_channel(self) -> Self:
        if any(len(color) != self.latent.channels + 1 for color in self.preview):
            raise ValueError(f"the preview's weights are not for {self.latent.channels} channels and a constant")
        return self

    @property
    def files(self) -> tuple[File, ...]:
        """Every file, once: graphs share weights, and backends share graphs."""
        onnx = (variant.files for graph in self.graphs.values() for variant in graph.onnx.values())
        compiled = (engine.files for build in self.builds.values() for engine in build.engines.values())
        shared = (file for files in (*onnx, *compiled) for file in files)
        return tuple(dict.fromkeys((self.tokenizer.file, *shared)))

    @property
    def parameters(self) -> dict[GraphName, int]:
        """The approximate number of weights of each graph, by the size of its files."""
        wide = 2 if self.weights == "fp16" else 4
        return {
            name: sum(file.size for file in graph.onnx["fp32"].files) // wide for name, graph in self.graphs.items()
        }

    @property
    def embeds_guidance(self) -> bool:
        """Whether the UNet takes the guidance scale as an input, as latent consistency models do: no second row."""
        return any(spec.name == GUIDANCE_EMBEDDED.name for spec in self.graphs["denoise"].inputs)

    def dims(self, size: Size) -> dict[str, int]:
        """The sizes of the contract's dimensions that the model, the pools and an image size decide."""
        fixed: dict[str, int] = {}
        for name, graph in self.graphs.items():
            shapes = {spec.name: spec.shape for spec in graph.inputs}
            fixed |= sizes_of(inputs_of(name, guidance_embedded=self.embeds_guidance), shapes)
            fixed |= sizes_of(OUTPUTS[name], {spec.name: spec.shape for spec in graph.outputs})
        return {
            **fixed,
            "S": self.slots,
            "C": self.context_rows,
            "P": self.feature_places,
            "h": size.height // self.latent.downscale,
            "w": size.width // self.latent.downscale,
            "H": size.height,
            "W": size.width,
        }

    @classmethod
    def load(cls, bundle: Path) -> Self:
        """Read and verify the bundle in folder `bundle`.

        Raises:
            BundleError: there is no manifest, it is not one of ours, or a file is missing or is not the one built.
        """
        manifest = cls.read(bundle)
        manifest.verify(bundle)
        return manifest

    @classmethod
    def read(cls, bundle: Path) -> Self:
        """Read the manifest without verifying the files. Raises BundleError."""
        try:
            text = (bundle / MANIFEST).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise BundleError(
                f"{bundle} holds no {MANIFEST}: build a bundle with build_engines.py --out {bundle}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{bundle / MANIFEST} cannot be read: {error}") from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the document"
            raise BundleError(
                f"{bundle / MANIFEST} is not a manifest this version reads: {where}: {first['msg']}. Build it again."
            ) from error

    def verify(self, bundle: Path) -> None:
        """Raise BundleError, naming the file, unless every file is there and is the one that was built."""
        for file in self.files:
            path = bundle / file.path
            if not path.is_file():
                raise BundleError(f"{path} is missing: copy the whole bundle again, or build it again.")
            if not file.matches(path):
                raise BundleError(
                    f"{path} is not the file that was built (sha256 differs): it is not loaded. Build again."
                )

    def save(self, bundle: Path) -> None:
        """Write the manifest, atomically and last: a bundle without one is an unfinished build."""
        write_atomically(bundle / MANIFEST, self.model_dump_json(indent=2).encode() + b"\n")


def _check_ports(what: str, ports: Sequence[Port], specs: Sequence[TensorSpec]) -> None:
    """Raise ValueError unless `specs` are those `ports`, in any order."""
    named = {spec.name: spec for spec in specs}
    if len(specs) != len(ports) or named.keys() != {port.name for port in ports}:
        raise ValueError(
            f"{what} are {', '.join(named)}, and this version has {', '.join(port.name for port in ports)}"
        )
    for port in ports:
        if not port.matches(spec := named[port.name]):
            raise ValueError(
                f"{what}: {port.name} is {spec.dtype} {list(spec.shape)}, not {port.dtype} {list(port.dims)}"
            )
