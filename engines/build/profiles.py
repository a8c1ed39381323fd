"""The shapes that engines are optimised for: static height and width, and one profile per row bucket.

Fixed sides matter: TensorRT fuses no GroupNorm whose height and width vary, and takes three times the memory. The
number of rows and the length of prompts may vary within a profile without losing a fusion. A profile takes the shapes
that a server binds and no others: memory and kernels are planned for its whole range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engines.build.served_shapes import pool_sizes
from engines.contract import LORA_GRAPHS, MAX_CHUNKS, STEPS, GraphName, TensorSpec, plain
from engines.manifest import Geometry, Profile, Size
from engines.row_buckets import rank_buckets

Range = tuple[int, int, int]  # least, best, largest


@dataclass(frozen=True, slots=True)
class Shapes:
    """A profile, and the range of each of its graph's named dimensions."""

    profile: Profile
    dims: Mapping[str, Range]

    def of(self, spec: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The least, best and largest shape of an input or output."""
        ranges = [(dim, dim, dim) if isinstance(dim, int) else self.dims[dim] for dim in spec.shape]
        least, best, largest = (tuple(one[which] for one in ranges) for which in range(3))
        return least, best, largest


def shapes(geometry: Geometry, graph: GraphName) -> tuple[Shapes, ...]:
    """Every profile of `graph`, in the order in which engines hold them: by size, then by batch, ascending."""
    if plain(graph) == "encode_prompt":
        return (Shapes(Profile(size=None, batch=1), {"N": _exactly(1), **_lora_dims(geometry, graph)}),)
    batches: Sequence[int] = {
        "denoise": geometry.rows,
        "denoise_shallow": geometry.rows,
        "decode": range(1, geometry.decode_batch + 1),
        "decode_fast": range(1, geometry.decode_batch + 1),
        "encode_image": (1,),
        "safety": range(1, geometry.decode_batch + 1),
    }[plain(graph)]
    # Steps of row counts between two of these take the larger one's profile; see `engines.row_buckets`.
    leasts = [batches[0], *(before + 1 for before in batches[:-1])] if graph in STEPS else batches
    return tuple(
        Shapes(Profile(size=size, batch=batch), _dims(size, (least, batch, batch), geometry, graph))
        for size in geometry.resolutions
        for least, batch in zip(leasts, batches, strict=True)
    )


def _dims(size: Size, batch: Range, geometry: Geometry, graph: GraphName) -> dict[str, Range]:
    return {
        "h": _exactly(size.height // geometry.latent.downscale),
        "w": _exactly(size.width // geometry.latent.downscale),
        "H": _exactly(size.height),
        "W": _exactly(size.width),
        **{name: _exactly(places) for name, places in pool_sizes(geometry, graph).items()},
        "L": (1, 1, MAX_CHUNKS),
        "B": batch,
        "R": batch,
        "n": batch,
        **_lora_dims(geometry, graph),
    }


def _lora_dims(geometry: Geometry, graph: GraphName) -> dict[str, Range]:
    """Those of the LoRA pool, and of the ranks that update a row, in graphs that have them."""
    if geometry.lora is None or graph not in LORA_GRAPHS.values():
        return {}
    least, *_, most = (*rank_buckets(geometry.lora), geometry.lora.ranks_per_row)
    return {"Q": _exactly(geometry.lora.pool_rows), "A": (least, least, most)}


def _exactly(value: int) -> Range:
    return value, value, value
