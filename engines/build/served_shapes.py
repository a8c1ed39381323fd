"""The inputs of a graph at the shapes that a server binds on a GPU: pools of their full size, steps of a row bucket."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engines.contract import DECODERS, LORA_GRAPHS, STEPS, Array, Arrays, GraphName, Port, sizes_of
from engines.manifest import Geometry, Manifest


class ServedShapes:
    """One call of a graph, padded as a server pads it. Engines take these shapes and no others; see `profiles`."""

    def __init__(self, manifest: Manifest, graph: GraphName, inputs: Arrays) -> None:
        self._ports, self._outputs = manifest.inputs(graph), manifest.outputs(graph)
        self._inputs = inputs
        self._own = sizes_of(self._ports, {name: array.shape for name, array in inputs.items()})
        self._sizes = self._own | pool_sizes(manifest, graph)
        if graph in STEPS:
            rows = next(rows for rows in manifest.rows if rows >= self._own["R"])
            self._sizes |= {"B": rows, "R": rows}

    @property
    def inputs(self) -> dict[str, Array]:
        """The inputs. What pads is of a spare slot, weighs nothing, and changes no output of the others."""
        return {port.name: _padded(port, self._inputs[port.name], self._sizes) for port in self._ports}

    def cut(self, outputs: Arrays) -> dict[str, Array]:
        """The part of the outputs that belongs to the inputs before padding."""
        parts = {port.name: tuple(slice(self._own.get(str(dim))) for dim in port.dims) for port in self._outputs}
        return {name: outputs[name][part] for name, part in parts.items()}


def pool_sizes(geometry: Geometry, graph: GraphName) -> dict[str, int]:
    """The sizes of the pools that a server binds to `graph`: decoding reads the staging pool, without a spare slot."""
    if graph in DECODERS.values():
        return {"S": geometry.max_rows}
    loras = {"Q": geometry.lora.pool_rows} if geometry.lora and graph in LORA_GRAPHS.values() else {}
    if graph not in STEPS:
        return loras
    return {"S": geometry.slots, "C": geometry.context_rows, "P": geometry.feature_places, **loras}


def _padded(port: Port, array: Array, sizes: Mapping[str, int]) -> Array:
    """`array`, with padding to the port's shape behind it: the last of what an index may name, which is spare."""
    shape = port.shape(sizes)
    if array.shape == shape:
        return array
    is_index = np.issubdtype(port.dtype, np.integer)
    padded = np.full(shape, (port.bound(sizes) or 1) - 1 if is_index else port.fill, port.dtype)
    padded[tuple(map(slice, array.shape))] = array
    return padded
