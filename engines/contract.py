"""The graphs and their contract: every input and output, and the sizes that exporting, planning and verifying share.

An input is added here, with the value at which it changes nothing. Export, manifest, profiles, memory on the device,
trajectories and verification take their ports from here, so all of them have it at that value until someone fills it.

Dimensions are numbers, or letters whose sizes are known later. Those of `VARYING` differ between calls: S slots, C rows
of the context pool, L chunks of a prompt per row, B images and R UNet rows of one step, P places in the feature pool,
N chunks to encode, n images to decode or encode, h×w latent size, H×W image size, Q ranks of the LoRA pool, A ranks
that update one row. The others are fixed by the checkpoint: c latent channels, f feature channels, T tokens per chunk,
D context width, V words of the vocabulary, E hidden states of the text encoder, k concepts and j special-care concepts
of the safety checker, G values of one rank of a LoRA. Of models with two text encoders: U words of the second one's
vocabulary, Z width of a pooled embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = Mapping[str, Array]

GraphName = Literal[
    "encode_prompt",
    "denoise",
    "denoise_shallow",
    "decode",
    "encode_image",
    "decode_fast",
    "safety",
    "encode_prompt_lora",
    "denoise_lora",
    "denoise_shallow_lora",
]
# Every model has these graphs.
GRAPHS: tuple[GraphName, ...] = ("encode_prompt", "denoise", "denoise_shallow", "decode", "encode_image")
DecoderName = Literal["vae", "fast"]
# What decodes images: the VAE, and a decoder distilled from it, which only some models have.
DECODERS: Mapping[DecoderName, GraphName] = {"vae": "decode", "fast": "decode_fast"}
VAE_GRAPHS: tuple[GraphName, ...] = ("decode", "encode_image")
PIXEL_GRAPHS: tuple[GraphName, ...] = (*VAE_GRAPHS, "decode_fast")  # each may compute in BF16 beside a UNet in FP16
# Graphs that LoRAs update, and for each the variant that applies those of its rows.
LORA_GRAPHS: Mapping[GraphName, GraphName] = {
    "encode_prompt": "encode_prompt_lora",
    "denoise": "denoise_lora",
    "denoise_shallow": "denoise_shallow_lora",
}
# Some models have `decode_fast` too, or `safety`, and the variants for LoRAs, all of them or none.
ALL_GRAPHS: tuple[GraphName, ...] = (*GRAPHS, "decode_fast", "safety", *LORA_GRAPHS.values())
PLAIN_STEPS: tuple[GraphName, ...] = ("denoise", "denoise_shallow")  # denoising steps of rows without LoRAs
STEPS: tuple[GraphName, ...] = (*PLAIN_STEPS, "denoise_lora", "denoise_shallow_lora")  # others run before and after

VARYING = frozenset("SCLBRPNnhwHWQA")
MEMORY = 3  # K: lanes of scheduler memory
LANES = 1 + MEMORY + 1  # of the state: x, the memory, and the x0 estimate that previews show
TERMS = 3 + MEMORY  # what a lane is a sum of: x, the model's output, fresh noise, the memory
INPAINT_LANES = 3  # the init image's latents, the noise added to them, and the keep mask: 1 where the image stays

# Prompts of several chunks share a step: shorter ones are repeated up to the longest. Attention is the same over whole
# repetitions, so prompts have 1, 2, 3 or 6 chunks, the divisors of this.
MAX_CHUNKS = 6

Role = Literal["pool", "plan", "noise", "data"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A graph's input or output as it was exported. Dimensions that vary between calls are named, others numbers."""

    name: str
    dtype: str  # numpy's name: float32, int64, uint8
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a graph.

    Its role tells where its memory lives: a `pool` stays on the device between calls, a `plan` is written by the host
    for each step, `noise` only for steps that draw it, `data` belongs to one call.
    """

    name: str
    dtype: str  # numpy's name
    dims: tuple[int | str, ...]
    role: Role = "data"
    below: int | str | None = None  # exclusive upper bound of its values: a number, or the size of a dimension
    fill: float = 0  # the neutral value, which changes nothing
    spread: float = 1  # the standard deviation of random values without a bound

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape where dimensions have `sizes`. Raises ValueError for a dimension without one."""
        return tuple(self._size(dim, sizes) for dim in self.dims)

    def bound(self, sizes: Mapping[str, int]) -> int | None:
        """The exclusive upper bound of its values, if it has one. Raises ValueError as `shape`."""
        return None if self.below is None else self._size(self.below, sizes)

    def spec(self, sizes: Mapping[str, int]) -> TensorSpec:
        """The port of a graph whose fixed dimensions have `sizes`."""
        shape = tuple(dim if dim in VARYING else self._size(dim, sizes) for dim in self.dims)
        return TensorSpec(self.name, self.dtype, shape)

    def matches(self, spec: TensorSpec) -> bool:
        """Whether `spec` is this port in some model: the same name, dtype and dimensions."""
        same = (self.name, self.dtype, len(self.dims)) == (spec.name, spec.dtype, len(spec.shape))
        return same and all(map(_allows, self.dims, spec.shape))

    def _size(self, dim: int | str, sizes: Mapping[str, int]) -> int:
        if isinstance(dim, int):
            return dim
        if dim not in sizes:
            raise ValueError(f"The size of dimension {dim} of {self.name} {list(self.dims)} is not given.")
        return sizes[dim]


def _allows(dim: int | str, exported: int | str) -> bool:
    """Whether a graph may have been exported with `exported` for `dim`: a number for a letter that is fixed."""
    return isinstance(exported, int) if isinstance(dim, str) and dim not in VARYING else dim == exported


def _f32(name: str, *dims: int | str, role: Role = "data", below: int | None = None, fill: float = 0) -> Port:
    return Port(name, "float32", dims, role, below, fill)


def _features(first: str) -> Port:
    """Deep features of the UNet, in FP16 at every precision: they are the largest pool."""
    return Port("features", "float16", (first, "f", "h", "w"), role="pool")


def _index(name: str, *dims: int | str, of: int | str, role: Role = "data") -> Port:
    return Port(name, "int64", dims, role, of)


def _images(name: str) -> Port:
    return Port(name, "uint8", ("n", "H", "W", 3), below=256)


_STATE = _f32("state", "S", LANES, "c", "h", "w", role="pool")
_STATE_NEXT = _f32("state_next", "S", LANES, "c", "h", "w", role="pool")
_STEP = (
    _STATE,
    _f32("context", "C", "T", "D", role="pool"),  # embeddings of chunks of prompts
    _f32("inpaint", "S", INPAINT_LANES, "c", "h", "w", role="pool"),
    _f32("noise", "B", "c", "h", "w", role="noise"),  # fresh, for stochastic schedulers
    _index("slot", "B", of="S", role="plan"),  # the slots that take this step
    _index("row_image", "R", of="B", role="plan"),  # the image of each row
    _index("row_context", "R", "L", of="C", role="plan"),  # the chunks that condition each row
    _f32("timestep", "R", role="plan", below=1000),
    _f32("guidance", "B", "R", role="plan"),  # how rows combine into each image's model output
    _f32("scale", "B", role="plan"),  # c_in
    _f32("coef", "B", LANES, TERMS, role="plan"),  # lane i becomes the sum over j of coef[i, j] · term j
    _f32("level", "B", 2, role="plan"),  # signal and noise of the inpainting latents after this step
)
# The root mean square of what guidance adds to the prediction for the prompt alone; 0 without negative rows.
GUIDANCE_EFFECT = _f32("guidance_effect", "B")
_FEATURES = (
    _features("P"),  # of earlier steps' deep layers
    _index("row_feature", "R", of="P", role="plan"),  # the place whose features each row takes
)
# The pool holds LoRAs as updates of rank one. One rank is the factors of every layer, one behind the other, with every
# scale of the file in them; see `engines.lora.layout`. A row is updated by the sum over its ranks, each by its weight.
LORA_POOL = Port("lora_pool", "float16", ("Q", "G"), role="pool", spread=1 / 8)


def _lora(rows: str, role: Role = "data") -> tuple[Port, ...]:
    """The ranks and weights that update each of `rows`. Ranks that are not needed weigh nothing."""
    return (
        LORA_POOL,
        _index("row_lora", rows, "A", of="Q", role=role),
        _f32("lora_weight", rows, "A", role=role),
    )


# What only some models have. Manifests tell by the ports of their graphs which of these a model has.
GUIDANCE_EMBEDDED = _f32("guidance_embedded", "R", role="plan")  # guidance scale minus 1, in place of negative rows
IDS_2 = _index("ids_2", "N", "T", of="U")  # of the second text encoder
TEXT_EMBEDS = _f32(
    "text_embeds", "C", "Z", role="pool"
)  # pooled embeddings, of the chunks in the same rows of `context`
# The pools of prompts, and the output of `encode_prompt` that each of their rows holds.
PROMPT_POOLS: Mapping[str, str] = {"context": "embeddings", TEXT_EMBEDS.name: TEXT_EMBEDS.name}
# Original height and width, top and left of the crop, target height and width: Podell et al. (2023), section 2.2.
TIME_IDS = _f32("time_ids", "R", 6, role="plan")
# Of UNets trained to inpaint, which read the pool `inpaint` differently: its lanes are the latents of the masked image,
# the mask, and 0. They take an image from `encode_image` without the pixels where the mask is 1.
MASK = Port("mask", "uint8", ("n", "H", "W"), below=2)

_ENCODE_PROMPT = (
    _index("ids", "N", "T", of="V"),
    _index("layer", "N", of="E"),  # which hidden state; the last, unless clip_skip asks for an earlier one
    _f32("weights", "N", "T", below=2, fill=1),  # of the tokens
)
_DECODE = (_STATE, _index("slot", "n", of="S", role="plan"))
_DECODED = (_images("images"), _f32("is_finite", "n"))  # 1, or 0 where latents or pixels are NaN or infinite
INPUTS: dict[GraphName, tuple[Port, ...]] = {
    "encode_prompt": _ENCODE_PROMPT,
    "denoise": _STEP,
    "denoise_shallow": (*_STEP, *_FEATURES),
    "decode": _DECODE,
    "encode_image": (_images("images"), _f32("noise", "n", "c", "h", "w")),
    "decode_fast": _DECODE,
    "safety": (_images("images"),),  # as decoders return them
    "encode_prompt_lora": (*_ENCODE_PROMPT, *_lora("N")),
    "denoise_lora": (*_STEP, *_lora("R", "plan")),
    "denoise_shallow_lora": (*_STEP, *_FEATURES, *_lora("R", "plan")),
}
OUTPUTS: dict[GraphName, tuple[Port, ...]] = {
    "encode_prompt": (_f32("embeddings", "N", "T", "D"),),
    "denoise": (_STATE_NEXT, GUIDANCE_EFFECT, _features("R")),
    "denoise_shallow": (_STATE_NEXT, GUIDANCE_EFFECT),
    "decode": _DECODED,
    "encode_image": (_f32("latents", "n", "c", "h", "w"),),
    "decode_fast": _DECODED,
    "safety": (_f32("concepts", "n", "k"), _f32("special_care", "n", "j")),  # similarity above each threshold
}
_OF_STEPS = (GUIDANCE_EMBEDDED, TEXT_EMBEDS, TIME_IDS)
_OPTIONAL_INPUTS: dict[GraphName, tuple[Port, ...]] = {
    "encode_prompt": (IDS_2,),
    "denoise": _OF_STEPS,
    "denoise_shallow": _OF_STEPS,
    "encode_image": (MASK,),
}
_OPTIONAL_OUTPUTS: dict[GraphName, tuple[Port, ...]] = {"encode_prompt": (_f32("text_embeds", "N", "Z"),)}
for _ports in (OUTPUTS, _OPTIONAL_INPUTS, _OPTIONAL_OUTPUTS):
    _ports |= {variant: _ports[graph] for graph, variant in LORA_GRAPHS.items() if graph in _ports}


def plain(graph: GraphName) -> GraphName:
    """The graph that `graph` is the variant for LoRAs of; otherwise `graph` itself."""
    return next((name for name, variant in LORA_GRAPHS.items() if variant == graph), graph)


def inputs_of(graph: GraphName, optional: Collection[str] = ()) -> tuple[Port, ...]:
    """The inputs of `graph`, in the manifest's order: those of every model, and the `optional` ones by name."""
    return (*INPUTS[graph], *_chosen(_OPTIONAL_INPUTS, graph, optional))


def outputs_of(graph: GraphName, optional: Collection[str] = ()) -> tuple[Port, ...]:
    """The outputs of `graph`, as `inputs_of`."""
    return (*OUTPUTS[graph], *_chosen(_OPTIONAL_OUTPUTS, graph, optional))


def _chosen(ports: Mapping[GraphName, tuple[Port, ...]], graph: GraphName, names: Collection[str]) -> Iterable[Port]:
    return (port for port in ports.get(graph, ()) if port.name in names)


def neutral(port: Port, sizes: Mapping[str, int]) -> Array:
    """The port at its neutral value."""
    return np.full(port.shape(sizes), port.fill, port.dtype)


def random_values(generator: np.random.Generator) -> Callable[[Port, Mapping[str, int]], Array]:
    """A function like `neutral` that draws values within each port's bound. Indices repeat only where they must, since
    no slot may take a step twice at once."""

    def draw(port: Port, sizes: Mapping[str, int]) -> Array:
        shape, below = port.shape(sizes), port.bound(sizes)
        if below is None:
            values = generator.standard_normal(shape, np.float32) * np.float32(port.spread)
            return values.astype(port.dtype, copy=False)
        if np.issubdtype(port.dtype, np.floating):
            return generator.uniform(0, below, shape).astype(port.dtype)
        if math.prod(shape) <= below:
            return generator.permutation(below)[: math.prod(shape)].reshape(shape).astype(port.dtype)
        return generator.integers(below, size=shape).astype(port.dtype)

    return draw


def build_inputs(
    ports: Iterable[Port],
    sizes: Mapping[str, int],
    values: Arrays | None = None,
    *,
    make: Callable[[Port, Mapping[str, int]], Array] = neutral,
) -> dict[str, Array]:
    """An array for every port: those of `values`, checked, and what `make` returns for the others.

    Raises:
        ValueError: a value has the name of no port, or not the port's dtype or shape, or a dimension has no size.
    """
    given, named = values or {}, {port.name: port for port in ports}
    if unknown := sorted(given.keys() - named.keys()):
        raise ValueError(f"There is no input {', '.join(unknown)}: the inputs are {', '.join(named)}.")
    for name, array in given.items():
        _check(named[name], array, sizes)
    return {name: given[name] if name in given else make(port, sizes) for name, port in named.items()}


def _check(port: Port, array: Array, sizes: Mapping[str, int]) -> None:
    shape = port.shape(sizes)
    if array.dtype != port.dtype or array.shape != shape:
        raise ValueError(
            f"{port.name} is {array.dtype} {list(array.shape)}: it must be {port.dtype} {list(shape)}, "
            f"[{', '.join(map(str, port.dims))}]."
        )


def sizes_of(ports: Iterable[Port], shapes: Mapping[str, tuple[int | str, ...]]) -> dict[str, int]:
    """The sizes of dimensions as they follow from the shapes of ports, by name; those still named are left out."""
    dims = [pair for port in ports if port.name in shapes for pair in zip(port.dims, shapes[port.name], strict=True)]
    return {dim: size for dim, size in dims if isinstance(dim, str) and isinstance(size, int)}
