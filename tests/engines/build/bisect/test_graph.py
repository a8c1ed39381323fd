"""What a tensor of one graph is in another: through casts, quantization, and names that mean something else there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from engines.build.bisect.graph import Graph, matched
from engines.contract import GraphName
from tests.engines.build.trt.block import draw


@pytest.fixture
def exact(tmp_path: Path) -> Graph:
    return Graph(draw(tmp_path / "fp32.onnx", dtype=np.float32))


def edited(tmp_path: Path, graph: Graph) -> Graph:
    path = tmp_path / "edited.onnx"
    onnx.save(graph.model, path)
    return Graph(path)


def test_the_demo_graphs_are_their_own_counterparts() -> None:
    graph = Graph(Path("engines/demo/onnx/denoise.onnx"))
    counterparts = graph.counterparts(graph)
    assert {name: counterparts[name] for name in graph.tensors()} == {name: name for name in graph.tensors()}


def test_a_graph_in_fp16_has_every_tensor_of_fp32(exact: Graph, tmp_path: Path) -> None:
    half = Graph(draw(tmp_path / "fp16.onnx", dtype=np.float16))
    assert half.counterparts(exact) == {name: name for name in ("x", *half.places())}


def test_casts_and_quantization_pass_a_tensor_on(exact: Graph, tmp_path: Path) -> None:
    first, second = (node for node in exact.nodes if node.op_type == "Conv")
    source = second.input[0]
    exact.model.graph.node.insert(
        list(exact.model.graph.node).index(second), helper.make_node("Cast", [source], ["narrow"], to=10, name="narrow")
    )
    exact.model.graph.node.insert(
        list(exact.model.graph.node).index(second), helper.make_node("Cast", ["narrow"], ["wide"], to=1, name="wide")
    )
    second.input[0] = "wide"
    original = Graph(exact.path)
    counterparts = edited(tmp_path, exact).counterparts(original)
    assert counterparts["narrow"] == counterparts["wide"] == source
    assert counterparts[second.output[0]] == second.output[0]
    assert counterparts[first.output[0]] == first.output[0]


def test_a_name_that_means_another_tensor_is_not_trusted(exact: Graph, tmp_path: Path) -> None:
    """Exporters number tensors: one more node shifts every name behind it."""
    renamed = {node.output[0]: f"n{number}" for number, node in enumerate(exact.nodes[:-1])}
    renamed |= {f"n{number}": name for name, number in zip(renamed, reversed(range(len(renamed))), strict=True)}
    for node in exact.model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    counterparts = edited(tmp_path, exact).counterparts(Graph(exact.path))
    original = Graph(exact.path)
    assert [counterparts[renamed.get(node.output[0], node.output[0])] for node in original.nodes] == [
        node.output[0] for node in original.nodes
    ]


def test_behind_a_rewritten_node_names_are_trusted_that_no_tool_gave(exact: Graph, tmp_path: Path) -> None:
    first, second = (node for node in exact.nodes if node.op_type == "Conv")
    exported, reference = Graph(exact.path), Graph(exact.path)
    first.op_type = "NhwcConv"
    rewritten = edited(tmp_path, exact)
    found = matched(rewritten, exported, reference)
    assert first.output[0] not in found
    assert found[second.output[0]] == second.output[0]
    for node in rewritten.nodes:
        node.input[:] = [f"val_{name[5:]}" if name == second.output[0] else name for name in node.input]
        node.output[:] = [f"val_{name[5:]}" if name == second.output[0] else name for name in node.output]
    numbered = edited(tmp_path, rewritten)
    assert not [name for name in matched(numbered, exported, reference) if name.startswith("val_")]


@pytest.mark.parametrize("name", ["denoise", "decode"])
def test_places_are_the_modules_of_the_model(name: GraphName) -> None:
    graph = Graph(Path(f"engines/demo/onnx/{name}.onnx"))
    places = graph.places()
    of_weights = [place for place in places.values() if place.operator in ("Conv", "MatMul") and "." in place.scope]
    assert len(of_weights) > 20
    assert {place.scope.split(".")[0].removeprefix("after ") for place in of_weights} == {
        "unet" if name == "denoise" else "vae"
    }


def test_what_is_made_of_weights_alone_is_not_compared() -> None:
    graph = Graph(Path("engines/demo/onnx/denoise.onnx"))
    compared = set(graph.tensors())
    casts = {node.output[0] for node in graph.nodes if node.input and node.input[0].endswith((".weight", ".weight.T"))}
    constant = {node.output[0] for node in graph.nodes if node.op_type == "Cast"} & casts
    assert constant
    assert not constant & compared
