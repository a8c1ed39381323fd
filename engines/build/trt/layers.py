"""The layers of an engine, read from TensorRT's log or its engine inspector."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

_LAYER = re.compile(r"^\s*Name: (?P<name>.*?), LayerType: ", re.MULTILINE)
_WRITES = re.compile(r", Outputs: \[ *\{.*?(?:Format/)?Datatype: (?P<type>[^,}]+)")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_COMPILED = re.compile(r"_myl(\d+)_\d+$")  # the compiler numbers its subgraphs


class LayerCounts(TypedDict):
    """Layers and fusions of an engine, in the profile with the fewest fusions."""

    total: int
    attentions: int  # in the graph
    fused_attentions: int
    group_norms: int  # in the graph
    fused_group_norms: int
    precisions: dict[str, int]  # number of layers by the dtype of their output: Half, Float, Int64 …


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """A layer of the engine, often many layers of the graph fused into one."""

    name: str
    profile: int | None  # None if the layer does not name one
    writes: str | None  # the dtype of its first output

    @property
    def subgraph(self) -> str | None:
        found = _COMPILED.search(self.name)
        return found and found[1]


def count_fusible(trt: Any, network: Any) -> dict[str, int]:
    """Count the attentions and GroupNorms of the graph as it was parsed."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    norms = [layer for layer in layers if layer.type == trt.LayerType.NORMALIZATION]
    return {
        "attentions": sum(layer.type == trt.LayerType.SOFTMAX for layer in layers),
        "group_norms": sum(_is_group_norm(tuple(layer.get_input(1).shape)) for layer in norms),
    }


def _is_group_norm(scale: tuple[int, ...]) -> bool:
    """Whether a normalisation with a scale of this shape is over groups [1, G, 1], rather than features [1, 1, C]."""
    return len(scale) > 2 and scale[1] != 1 and scale[-1] == 1


def logged_layers(table: str) -> list[EngineLayer]:
    """Read the table that TensorRT logs at the end of a build."""
    lines = ((found, line) for line in table.splitlines() if (found := _LAYER.match(line)))
    return [EngineLayer(found["name"], _profile(line), _written(line)) for found, line in lines]


def inspected_layers(information: str) -> list[EngineLayer]:
    """Read the engine inspector's JSON. Layers that it lists only by name have no dtype."""
    layers: list[EngineLayer] = []
    for entry in json.loads(information)["Layers"]:
        fields: dict[str, Any] = {"Name": entry} if isinstance(entry, str) else entry
        outputs: list[dict[str, str]] = fields.get("Outputs", [])
        first = outputs[0] if outputs else {}
        writes = first.get("Datatype", first.get("Format/Datatype"))
        layers.append(EngineLayer(fields["Name"], _profile(json.dumps(fields)), writes))
    return layers


def _profile(description: str) -> int | None:
    found = _PROFILE.search(description)
    return int(found[1]) if found else None


def _written(line: str) -> str | None:
    found = _WRITES.search(line)
    return found["type"].strip() if found else None


def summarize(layers: Iterable[EngineLayer], graph: Mapping[str, int]) -> LayerCounts:
    """Count the layers of the profile with the fewest fusions. `graph` is from `count_fusible`."""
    return min(
        (_counts(of_profile, graph) for of_profile in _by_profile(list(layers))),
        key=lambda counts: counts["fused_attentions"] + counts["fused_group_norms"],
    )


def _by_profile(layers: list[EngineLayer]) -> list[list[EngineLayer]]:
    """Group by profile. A layer that names none has its subgraph's; a subgraph that names none has the first."""
    of_subgraph = {compiled.subgraph: compiled.profile for compiled in layers if compiled.profile is not None}
    profiles: dict[int, list[EngineLayer]] = {}
    for compiled in layers:
        inferred = of_subgraph.get(compiled.subgraph, 0) if compiled.subgraph is not None else 0
        profiles.setdefault(inferred if compiled.profile is None else compiled.profile, []).append(compiled)
    return list(profiles.values())


def _counts(layers: list[EngineLayer], graph: Mapping[str, int]) -> LayerCounts:
    return {
        "total": len(layers),
        "attentions": graph["attentions"],
        "fused_attentions": sum("_gemm_mha" in compiled.name for compiled in layers),
        "group_norms": graph["group_norms"],
        "fused_group_norms": sum("Gnor" in compiled.name for compiled in layers),
        "precisions": dict(Counter(compiled.writes for compiled in layers if compiled.writes)),
    }


def is_layer_table(text: str) -> bool:
    """Whether a message of TensorRT's log is the table of an engine's layers."""
    return bool(_LAYER.search(text))
