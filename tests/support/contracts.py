"""Manifests of models whose graphs have inputs that no graph has yet."""

from __future__ import annotations

from engines.contract import STEPS, Port
from engines.manifest import Manifest


def with_inputs(manifest: Manifest, *ports: Port) -> Manifest:
    """`manifest` as it would be if the denoise graphs had been exported with `ports` too."""
    sizes = manifest.dims(manifest.resolutions[0])
    specs = tuple(port.spec(sizes) for port in ports)
    graphs = {
        name: graph.model_copy(update={"inputs": (*graph.inputs, *specs)}) if name in STEPS else graph
        for name, graph in manifest.graphs.items()
    }
    return manifest.model_copy(update={"graphs": graphs})
