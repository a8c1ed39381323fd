"""`manifest.json`: everything the server knows about a built model, with the hashes of its files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import numpy as np
from pydantic import Field, ValidationError, field_validator, model_validator

from engines.contract import (
    ALL_GRAPHS,
    GRAPHS,
    GUIDANCE_EMBEDDED,
    IDS_2,
    INPUTS,
    LORA_GRAPHS,
    LORA_POOL,
    MASK,
    TEXT_EMBEDS,
    TIME_IDS,
    GraphName,
    Port,
    TensorSpec,
    inputs_of,
    outputs_of,
    plain,
    sizes_of,
)
from engines.errors import BundleError
from engines.files import open_regular, write_atomically
from engines.held import HeldFiles
from engines.manifest_fields import (
    SPECIAL_TOKENS,
    Build,
    Compiled,
    ComputeDtype,
    Context,
    Defaults,
    Difference,
    FeatureDrift,
    File,
    FusionReport,
    Geometry,
    Gpu,
    Graph,
    Latent,
    LoraCapacity,
    LoraLayer,
    LoraPart,
    NoiseSchedule,
    Onnx,
    Precision,
    Profile,
    Size,
    Source,
    Storage,
    Tokenizer,
    Verification,
    Word,
    check_factors,
)

__all__ = [
    "FORMAT",
    "MANIFEST",
    "Build",
    "BundleError",
    "Compiled",
    "ComputeDtype",
    "Context",
    "Defaults",
    "Difference",
    "FeatureDrift",
    "File",
    "FusionReport",
    "Geometry",
    "Gpu",
    "Graph",
    "Latent",
    "LoraCapacity",
    "LoraLayer",
    "LoraPart",
    "Manifest",
    "NoiseSchedule",
    "Onnx",
    "Precision",
    "Profile",
    "Size",
    "Source",
    "Storage",
    "Tokenizer",
    "Verification",
]

MANIFEST = "manifest.json"
FORMAT: Final = 4  # raised when older bundles can no longer be read
_LARGEST = 8 << 20  # bytes of a manifest; those we write have some tens of thousands
_LONGEST_MESSAGE = 300
_WIDEST = 65536  # of a fixed dimension, but for the values of one rank of a LoRA
_OF_SHALLOW_STEPS = {port.name for port in INPUTS["denoise_shallow"]} - {port.name for port in INPUTS["denoise"]}
_MOST_MEMORY = 1 << 40  # bytes; no device has more


class Manifest(Geometry):
    """A built model. `Manifest.load` reads one and verifies its files."""

    format: Literal[4] = FORMAT
    name: Annotated[Word, Field(min_length=1)]
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
    feature_drift: FeatureDrift | None = Field(
        default=None, description="as it was measured, for the step cache; None: as the demo model's"
    )
    examples: tuple[str, ...] = Field(
        default=(), max_length=1000, description="prompts that show what the model can do"
    )
    notes: str = Field(default="", max_length=1000, description="what users should know of it, in a sentence or two")
    lora_layers: tuple[LoraLayer, ...] = Field(default=(), max_length=10_000, description="layers that LoRAs update")
    lora_refused: tuple[Word, ...] = Field(
        default=(), max_length=10_000, description="layers that LoRAs may name, and the graphs cannot update"
    )
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
        if missing := [name for name in LORA_GRAPHS.values() if self.lora and name not in self.graphs]:
            raise ValueError(f"the graph {missing[0]} is missing, which applies LoRAs")
        if self.lora and not self.lora_layers:
            raise ValueError("there are graphs that apply LoRAs, and no layers that LoRAs update")
        for name, graph in self.graphs.items():
            _check_ports(f"inputs of the graph {name}", self.inputs(name), graph.inputs)
            _check_ports(f"outputs of the graph {name}", self.outputs(name), graph.outputs)
        return self

    @model_validator(mode="after")
    def _optional_ports_agree(self) -> Self:
        """What only some models have, all graphs have that need it of each other."""
        full, shallow = self.inputs("denoise"), self.inputs("denoise_shallow")
        if odd := {port.name for port in (*full, *shallow) if (port in full) != (port in shallow)} - _OF_SHALLOW_STEPS:
            raise ValueError(f"only one of the graphs denoise and denoise_shallow has the input {min(odd)}")
        if TEXT_EMBEDS in full and TEXT_EMBEDS.name not in {port.name for port in self.outputs("encode_prompt")}:
            raise ValueError(f"the graph denoise reads {TEXT_EMBEDS.name}, which encode_prompt does not return")
        if (IDS_2 in self.inputs("encode_prompt")) != (self.tokenizer.pad_2 is not None):
            raise ValueError(
                f"the tokenizer has a pad_2 only for a graph encode_prompt with {IDS_2.name}, and then always"
            )
        return self

    @model_validator(mode="after")
    def _builds_have_every_graph(self) -> Self:
        for backend, build in self.builds.items():
            if missing := [name for name in self.graphs if name not in build.engines]:
                raise ValueError(f"the engine of {missing[0]} for {backend} is missing")
            if extra := [name for name in build.engines if name not in self.graphs]:
                raise ValueError(f"{backend} has an engine of {extra[0]}, and the model has no such graph")
        return self

    @model_validator(mode="after")
    def _graphs_agree(self) -> Self:
        """The graphs have the same fixed dimensions: the model's where it states them."""
        known = {"c": self.latent.channels, "T": self.context.tokens, "D": self.context.width}
        for name, graph in self.graphs.items():
            ports = (*self.inputs(name), *self.outputs(name))
            shapes = {spec.name: spec.shape for spec in (*graph.inputs, *graph.outputs)}
            for port in ports:
                for dim, size in sizes_of([port], shapes).items():
                    widest = _MOST_MEMORY if dim == "G" else _WIDEST
                    if not 0 < size <= widest or known.setdefault(dim, size) != size:
                        expected = known.get(dim, f"1 to {widest}")
                        raise ValueError(f"the graph {name}: {port.name} has {size} for {dim}, not {expected}")
        return self

    @model_validator(mode="after")
    def _lora_factors_are_apart(self) -> Self:
        """Each at a multiple of its width, as graphs gather it, within one rank of the pool and over no other."""
        if not self.lora_layers:
            return self
        if missing := [name for name in LORA_GRAPHS.values() if name not in self.graphs]:
            raise ValueError(f"LoRAs update layers, and the graph {missing[0]} is missing")
        pool = next(spec for spec in self.graphs["denoise_lora"].inputs if spec.name == LORA_POOL.name)
        check_factors(self.lora_layers, width=int(pool.shape[1]))
        return self

    @model_validator(mode="after")
    def _a_path_is_one_file(self) -> Self:
        paths = [file.path for file in self.files]
        if twice := next((path for path, times in Counter(paths).items() if times > 1), None):
            raise ValueError(f"{twice} is listed twice, with another size or sha256")
        return self

    @model_validator(mode="after")
    def _embeddings_fit(self) -> Self:
        for token, vectors in self.tokenizer.embeddings.items():
            if vectors > self.context.tokens - SPECIAL_TOKENS:
                raise ValueError(f"the embedding {token} has {vectors} vectors: they do not fit into a chunk")
        return self

    @model_validator(mode="after")
    def _pools_are_possible(self) -> Self:
        if self.pool_bytes > _MOST_MEMORY:
            raise ValueError(
                f"{self.max_rows} rows of {len(self.resolutions)} sizes: {self.pool_bytes / 2**40:.0f} TiB of memory"
            )
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
    def graph_names(self) -> tuple[GraphName, ...]:
        """The graphs of this model, in the contract's order."""
        return tuple(name for name in ALL_GRAPHS if name in self.graphs)

    @property
    def has_safety_checker(self) -> bool:
        """Whether images can be checked by the checkpoint's own safety checker."""
        return "safety" in self.graphs

    @property
    def has_fast_decoder(self) -> bool:
        """Whether a distilled decoder may decode in place of the VAE's."""
        return "decode_fast" in self.graphs

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pools that a server allocates when it starts."""
        pools = [port for port in (*self.inputs("denoise_shallow"), *self.outputs("denoise")) if port.role == "pool"]
        staging = [port for port in pools if port.name == "state"]
        shared = [port for port in pools if port.dims[0] == "C"]
        each = sum(
            _bytes(port, {**self.dims(size), "R": self.max_rows, "n": self.decode_batch})
            for size in self.resolutions
            for port in (*pools, *staging, *self.outputs("decode"))
            if port not in shared
        )
        return each + self.lora_bytes + sum(_bytes(port, self.dims(self.resolutions[0])) for port in shared)

    @property
    def lora_bytes(self) -> int:
        """Bytes of the LoRA pool; 0 where there is none."""
        return _bytes(LORA_POOL, self.dims(self.resolutions[0])) if self.lora else 0

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

    @property
    def has_size_conditions(self) -> bool:
        """Whether sizes of the image and of a crop condition the UNet, as in Stable Diffusion XL."""
        return any(spec.name == TIME_IDS.name for spec in self.graphs["denoise"].inputs)

    @property
    def is_for_inpainting(self) -> bool:
        """Whether the UNet reads a mask and the masked image, as models trained to inpaint do."""
        return any(spec.name == MASK.name for spec in self.graphs["encode_image"].inputs)

    @property
    def mask_strength(self) -> float:
        """The strength of requests with a mask that do not set it: that of the inpainting pipeline in diffusers.

        Less than 1 takes a step less, and begins with the noised image.
        """
        return 0.9999 if self.has_size_conditions else 1.0

    def inputs(self, name: GraphName) -> tuple[Port, ...]:
        """The inputs of a graph of this model, as it has them or, if it lacks the graph, would have them."""
        return inputs_of(name, self._names(name))

    def outputs(self, name: GraphName) -> tuple[Port, ...]:
        """The outputs of a graph, as `inputs`."""
        return outputs_of(name, self._names(name))

    def _names(self, name: GraphName) -> set[str]:
        graph = self.graphs[plain(name)]
        return {spec.name for spec in (*graph.inputs, *graph.outputs)}

    def dims(self, size: Size) -> dict[str, int]:
        """The sizes of the contract's dimensions that the model, the pools and an image size decide."""
        fixed: dict[str, int] = {}
        for name, graph in self.graphs.items():
            shapes = {spec.name: spec.shape for spec in graph.inputs}
            fixed |= sizes_of(self.inputs(name), shapes)
            fixed |= sizes_of(self.outputs(name), {spec.name: spec.shape for spec in graph.outputs})
        return {
            **fixed,
            "S": self.slots,
            "C": self.context_rows,
            "P": self.feature_places,
            "Q": self.lora.pool_rows if self.lora else 0,
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
        path = bundle / MANIFEST
        try:
            with open(open_regular(path.resolve(), max_size=_LARGEST), "rb") as file:
                content = file.read(_LARGEST)
        except FileNotFoundError:
            raise BundleError(
                f"{bundle} holds no {MANIFEST}: build a bundle with build_engines.py --out {bundle}"
            ) from None
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            raise BundleError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            raise BundleError(
                f"{path} is not a manifest this version reads: {_first(error)}. Build it again."
            ) from error

    def hold(self, bundle: Path) -> HeldFiles:
        """Open every file of the bundle in folder `bundle`. Raises BundleError, naming the first that is not there."""
        return HeldFiles(bundle, self.files)

    def verify(self, bundle: Path) -> None:
        """Raise BundleError, naming the file, unless every file is there and is the one that was built."""
        with self.hold(bundle) as files:
            files.verify()

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


def _bytes(port: Port, dims: Mapping[str, int]) -> int:
    return math.prod(port.shape(dims)) * np.dtype(port.dtype).itemsize


def _first(error: ValidationError) -> str:
    """The first error in one line, whatever the document says."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"])) or "the document"
    message = f"{where}: {first['msg'].removeprefix('Value error, ')}"
    return "".join(letter if letter.isprintable() else "?" for letter in message)[:_LONGEST_MESSAGE]
