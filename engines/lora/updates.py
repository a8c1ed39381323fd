"""Which layers a LoRA updates, and by what: the tensors of a file as low-rank updates of the model's layers."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.errors import CheckpointError
from engines.lora.file import LoraFile, LoraHeader
from engines.lora.hints import printable
from engines.lora.names import Factor, Form, Kind, Target, read_name, targets_by_name
from engines.lora.scaling import Scaling, scaling_of
from engines.manifest import LoraPart

_OTHER_MODEL = "it was made for another model"


class Shape(NamedTuple):
    """Of a layer's weight; `inputs` counts every value of a convolution's kernel."""

    outputs: int
    inputs: int


@dataclass(frozen=True, slots=True)
class Source:
    """The tensors of a file that update a layer of the model."""

    target: Target
    layer: str  # by the file's name for it
    keys: Mapping[Kind, str]
    rank: int


@dataclass(frozen=True)
class Outline:
    """What a file updates, as its header says."""

    header: LoraHeader
    form: Form
    sources: tuple[Source, ...]
    scaling: Mapping[LoraPart, Scaling]

    @cached_property
    def ranks(self) -> Counter[Target]:
        """Of each layer's updates together."""
        ranks = Counter[Target]()
        for source in self.sources:
            ranks[source.target] += source.rank
        return ranks

    @property
    def rank(self) -> int:
        """The largest of a layer."""
        return max(self.ranks.values())

    @property
    def parts(self) -> frozenset[LoraPart]:
        """Those that it updates."""
        return frozenset(target.part for target in self.ranks)


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """W += scale · up · down, Hu et al. (2021), section 4.1; of a convolution that `mid` lies in, all three."""

    target: Target
    layer: str  # by the file's name for it
    up: NDArray[np.float32]  # [out, r], or [out, s] with `mid`
    mid: NDArray[np.float32] | None  # [s, r, kernel]
    down: NDArray[np.float32]  # [r, in], or [r, in, kernel]
    scale: float  # alpha / rank


def outline(header: LoraHeader, layers: Mapping[Target, Shape], *, refused: Iterable[Target] = ()) -> Outline:
    """Find the layers that a file updates.

    Args:
        header: the file's.
        layers: those of the model that may be updated, each part's in the order of its modules.
        refused: those that LoRAs name and that may not be updated.

    Raises:
        CheckpointError: the file is damaged, made for another model, or updates a layer that may not be.
    """
    factors, form = _factors(header)
    named = targets_by_name((*layers, *refused), header.metadata if form == "early" else {})
    scaling = scaling_of(header.name, header.shapes, header.metadata, header.config)
    return Outline(
        header,
        form,
        tuple(_source(header, layer, keys, named.get(layer, []), layers) for layer, keys in factors.items()),
        scaling,
    )


def updates(file: LoraFile, outline: Outline) -> Iterator[Update]:
    """Read the updates of a file."""
    for source in outline.sources:
        tensors = {kind: file.tensors[key] for kind, key in source.keys.items()}
        alpha = tensors.get("alpha")
        yield Update(
            source.target,
            source.layer,
            up=tensors["up"].reshape(len(tensors["up"]), -1),
            mid=tensors.get("mid"),
            down=tensors["down"],
            scale=outline.scaling[source.target.part].of(source.target, source.rank)
            if alpha is None
            else float(alpha.item()) / source.rank,
        )


def _factors(header: LoraHeader) -> tuple[dict[str, dict[Kind, str]], Form]:
    """The names of the tensors of every layer, by the file's name for it, and the form that they have."""
    layers: dict[str, dict[Kind, str]] = defaultdict(dict)
    factors: list[Factor] = []
    for name in (key for key in header.shapes if key not in header.learned):
        factor = read_name(name)
        if factor is None:
            raise CheckpointError(f"{header.name} holds {printable(name)}, which is not a known factor of a LoRA.")
        layers[factor.layer][factor.kind] = name
        factors.append(factor)
    matrices = [factor for factor in factors if factor.kind in ("down", "up")]
    if len(adapters := {factor.adapter for factor in matrices}) > 1:
        names = ", ".join(sorted(str(adapter or "without a name") for adapter in adapters))
        raise CheckpointError(
            f"{header.name} holds several adapters ({printable(names)}): save each to a file of its own."
        )
    if not matrices:
        raise CheckpointError(f"{header.name} holds no factors of a LoRA: it is empty.")
    return layers, matrices[0].form


def _source(
    header: LoraHeader, layer: str, keys: Mapping[Kind, str], named: Sequence[Target], layers: Mapping[Target, Shape]
) -> Source:
    """The update of a layer, one of those that are `named` so. Raises CheckpointError."""
    file, shown = header.name, printable(layer)
    if not named:
        raise CheckpointError(f"{file} updates the layer {shown}, which this model does not have: {_OTHER_MODEL}.")
    if lacking := {"up", "down"} - keys.keys():
        raise CheckpointError(
            f"{file} lacks the factor {' and '.join(sorted(lacking))} of the layer {shown}: it is incomplete. "
            "Download it again."
        )
    shapes = {kind: header.shapes[key] for kind, key in keys.items()}
    if not _agree(shapes):
        held = ", ".join(f"{kind} {list(shape)}" for kind, shape in sorted(shapes.items()))
        raise CheckpointError(
            f"{file} does not fit the shape of its own factors in the layer {shown} ({held}): it is damaged."
        )
    found = _shape(shapes)
    target = next((one for one in named if layers.get(one) == found), named[0])
    if target not in layers:
        raise CheckpointError(
            f"{file} updates the convolution {target.name}, as LoCon does, which LoRAs of requests cannot: choose a "
            "LoRA without convolutions, or fuse it into the model (build_engines.py --lora)."
        )
    if found != (wanted := layers[target]):
        raise CheckpointError(
            f"{file} does not fit the shape of the layer {shown}: its update is {found.outputs}x{found.inputs}, the "
            f"weight {wanted.outputs}x{wanted.inputs}: {_OTHER_MODEL}."
        )
    return Source(target, layer, keys, rank=shapes["down"][0])


def _agree(shapes: Mapping[Kind, tuple[int, ...]]) -> bool:
    """Whether the factors of a layer can be multiplied."""
    up, down, mid = shapes["up"], shapes["down"], shapes.get("mid")
    if min(len(up), len(down)) < 2 or 0 in (*up, *down, *(mid or ())) or math.prod(shapes.get("alpha", ())) != 1:
        return False
    if mid is None:
        return math.prod(up[1:]) == down[0]
    return len(mid) == 4 and math.prod(up[1:]) == mid[0] and mid[1] == down[0]


def _shape(shapes: Mapping[Kind, tuple[int, ...]]) -> Shape:
    """Of the product of a layer's factors."""
    kernel = math.prod(shapes["mid"][2:]) if "mid" in shapes else 1
    return Shape(outputs=shapes["up"][0], inputs=math.prod(shapes["down"][1:]) * kernel)
