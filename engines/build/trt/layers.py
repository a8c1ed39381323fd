"""What the compiler made of a graph's layers, as TensorRT's log or its engine inspector describes them."""

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
_COMPILED = re.compile(r"_myl(\d+)_\d+$")  # the compiler numbers the subgraphs that it is given


class LayerCounts(TypedDict):
    """What the compiler made of a graph, in the profile that came out worst."""

    total: int
    attentions: int  # of the graph
    fused_attentions: int
    group_norms: int  # of the graph
    fused_group_norms: int
    precisions: dict[str, int]  # layers by the type they write: Half, Float, Int64 …


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """A layer of the engine, often made of many of the graph's."""

    name: str
    profile: int | None  # None where it has to be inferred
    writes: str | None  # the type of its first output

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
    """Whether a normalisation whose scale has this shape is over groups [1, G, 1], rather than features [1, 1, C]."""
    return len(scale) > 2 and scale[1] != 1 and scale[-1] == 1


def logged_layers(table: str) -> list[EngineLayer]:
    """Read the table that TensorRT logs at the end of a build."""
    lines = ((found, line) for line in table.splitlines() if (found := _LAYER.match(line)))
    return [EngineLayer(found["name"], _profile(line), _written(line)) for found, line in lines]


def inspected_layers(information: str) -> list[EngineLayer]:
    """Read the engine inspector's JSON. Of layers that it tells by name only, the type stays unknown."""
    layers: list[EngineLayer] = []
    for told in json.loads(information)["Layers"]:
        facts: dict[str, Any] = {"Name": told} if isinstance(told, str) else told
        outputs: list[dict[str, str]] = facts.get("Outputs", [])
        first = outputs[0] if outputs else {}
        writes = first.get("Datatype", first.get("Format/Datatype"))
        layers.append(EngineLayer(facts["Name"], _profile(json.dumps(facts)), writes))
    return layers


def _profile(description: str) -> int | None:
    found = _PROFILE.search(description)
    return int(found[1]) if found else None


def _written(line: str) -> str | None:
    found = _WRITES.search(line)
    return found["type"].strip() if found else None


def summarize(layers: Iterable[EngineLayer], graph: Mapping[str, int]) -> LayerCounts:
    """Describe the profile in which least is fused."""
    return min(
        (_counts(of_profile, graph) for of_profile in _by_profile(list(layers))),
        key=lambda counts: counts["fused_attentions"] + counts["fused_group_norms"],
    )


def _by_profile(layers: list[EngineLayer]) -> list[list[EngineLayer]]:
    """Sort by profile. One that names none belongs with its subgraph; a subgraph that names none is the first's."""
    of_subgraph = {kernel.subgraph: kernel.profile for kernel in layers if kernel.profile is not None}
    profiles: dict[int, list[EngineLayer]] = {}
    for kernel in layers:
        inferred = of_subgraph.get(kernel.subgraph, 0) if kernel.subgraph is not None else 0
        profiles.setdefault(inferred if kernel.profile is None else kernel.profile, []).append(kernel)
    return list(profiles.values())


def _counts(layers: list[EngineLayer], graph: Mapping[str, int]) -> LayerCounts:
    return {
        "total": len(layers),
        "attentions": graph["attentions"],
        "fused_attentions": sum("_gemm_mha" in kernel.name for kernel in layers),
        "group_norms": graph["group_norms"],
        "fused_group_norms": sum("Gnor" in kernel.name for kernel in layers),
        "precisions": dict(Counter(kernel.writes for kernel in layers if kernel.writes)),
    }


def is_layer_table(text: str) -> bool:
    """Whether a message of TensorRT's log is the table of an engine's layers."""
    return bool(_LAYER.search(text))
