"""Which layers of a UNet compute in eight bits, and the preparation of its graph for ModelOpt, which marks them."""

from __future__ import annotations

import re
from pathlib import Path

import onnx_ir as ir

_LAYERS = ("Conv", "Gemm", "MatMul")
# Those that read the timestep, read or write latents, or read sums that no norm has bounded. NVIDIA's demo/Diffusion
# and ModelOpt's examples for diffusers leave out the same.
_EXACT = re.compile(r"\.(time_embedding|time_emb_proj|add_embedding|conv_in|conv_out|conv_shortcut|proj_out)\.")


def quantizable(graph: ir.Graph) -> list[str]:
    """Names of the convolutions and linear layers that compute in eight bits.

    A step's own arithmetic (guidance, coefficients) has no weights, and keeps its precision, as attention does.
    """
    return [str(node.name) for node in graph if node.op_type in _LAYERS and _takes_eight_bits(node)]


def _takes_eight_bits(layer: ir.Node) -> bool:
    weight = layer.inputs[1]
    return weight is not None and weight.is_initializer() and not _EXACT.search(str(weight.name))


def save_alone(model: ir.Model, path: Path) -> None:
    """Write the graph to `path`, with weights of its own in the same folder, each in the type that its layer reads.

    ModelOpt takes a weight behind a cast for an activation, and writes into the folder and the file that it reads.
    """
    graph = model.graph
    for cast in [node for node in graph if node.op_type == "Cast"]:
        stored = cast.inputs[0]
        if stored is not None and stored.is_initializer() and len(stored.uses()) == 1:
            _fold(graph, cast, stored)
    ir.save(model, path, external_data=f"{path.stem}.weights")


def _fold(graph: ir.Graph, cast: ir.Node, stored: ir.Value) -> None:
    """Put the weight that `cast` makes of `stored` in its place, under its name."""
    assert stored.const_value is not None  # noqa: S101 - an initializer has one
    name, dtype = str(stored.name), ir.DataType(cast.attributes["to"].as_int())
    values = stored.const_value.numpy().astype(dtype.numpy())
    folded = ir.Value(
        name=name, shape=ir.Shape(values.shape), type=ir.TensorType(dtype), const_value=ir.tensor(values, name=name)
    )
    cast.outputs[0].replace_all_uses_with(folded)
    graph.remove(cast, safe=True)
    del graph.initializers[name]
    graph.initializers.add(folded)
