"""The shapes that engines are optimised for: static height and width, and one profile per row bucket.

Fixed sides matter: TensorRT fuses no GroupNorm whose height and width vary, and takes three times the memory. The
number of rows and the length of prompts may vary within a profile without losing a fusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engines.contract import MAX_CHUNKS, GraphName, TensorSpec
from engines.manifest import Geometry, Profile

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
    if graph == "encode_prompt":
        return (Shapes(Profile(size=None, batch=1), {"N": _exactly(1)}),)
    batches = {
        "denoise": geometry.rows,
        "denoise_shallow": geometry.rows,
        "decode": range(1, geometry.decode_batch + 1),
        "encode_image": (1,),
        "safety": range(1, geometry.decode_batch + 1),
    }[graph]
    return tuple(
        Shapes(profile, _dims(profile, graph, geometry))
        for profile in (Profile(size=size, batch=batch) for size in geometry.resolutions for batch in batches)
    )


def _dims(profile: Profile, graph: GraphName, geometry: Geometry) -> dict[str, Range]:
    assert profile.size is not None  # noqa: S101 - only encode_prompt has no size
    size, batch = profile.size, profile.batch
    up_to_batch = (1, batch, batch)
    return {
        "h": _exactly(size.height // geometry.latent.downscale),
        "w": _exactly(size.width // geometry.latent.downscale),
        "H": _exactly(size.height),
        "W": _exactly(size.width),
        "S": (1, geometry.slots, geometry.slots),
        "C": (1, geometry.context_rows, geometry.context_rows),
        "L": (1, 1, MAX_CHUNKS),
        "B": up_to_batch,
        "R": up_to_batch,
        "P": (1, geometry.feature_places, geometry.feature_places),
        "n": _exactly(batch) if graph in ("decode", "safety") else up_to_batch,
    }


def _exactly(value: int) -> Range:
    return value, value, value
