"""A block of a UNet as an ONNX graph, drawn node by node as torch's exporter writes it, and profiles for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.build.trt.messages import Ranges

CHANNELS, HEADS = 320, 8
SIDE = 8


class Drawn:
    """A graph under construction: nodes and weights as torch's exporter writes them."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self.dtype = dtype
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self._dice = np.random.default_rng(0)

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=f"node_{name}", **attributes))
        return name

    def constant(self, values: Any, dtype: type[np.generic] | None = None) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype or self.dtype), name))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(self._dice.standard_normal(shape) * 0.05)

    def reshape(self, x: str, *shape: int) -> str:
        return self.node("Reshape", x, self.constant(shape, np.int64))

    def conv(self, x: str, channels: int) -> str:
        return self.node("Conv", x, self.weight(CHANNELS, channels, 3, 3), self.weight(CHANNELS), pads=[1, 1, 1, 1])

    def group_norm(self, x: str, groups: int = 32) -> str:
        ones, zeros = self.constant(np.ones(groups)), self.constant(np.zeros(groups))
        normed = self.node("InstanceNormalization", self.reshape(x, 0, groups, -1), ones, zeros, epsilon=1e-5)
        back = self.node("Reshape", normed, self.node("Shape", x))
        return self.node("Add", self.node("Mul", back, self.weight(CHANNELS, 1, 1)), self.weight(CHANNELS, 1, 1))

    def silu(self, x: str) -> str:
        return self.node("Mul", x, self.node("Sigmoid", x))

    def attention(self, x: str) -> str:
        """Self-attention of [R, tokens, CHANNELS], behind a LayerNorm."""
        scale = self.constant((CHANNELS / HEADS) ** -0.25)
        normed = self.node("LayerNormalization", x, self.weight(CHANNELS), self.weight(CHANNELS), axis=-1)
        q, k, v = (self._heads(normed, order) for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]))
        scores = self.node("MatMul", self.node("Mul", q, scale), self.node("Mul", k, scale))
        seen = self.node("MatMul", self.node("Softmax", scores, axis=-1), v)
        return self.node("Add", self.reshape(self.node("Transpose", seen, perm=[0, 2, 1, 3]), 0, -1, CHANNELS), x)

    def _heads(self, x: str, order: list[int]) -> str:
        projected = self.node("MatMul", x, self.weight(CHANNELS, CHANNELS))
        return self.node("Transpose", self.reshape(projected, 0, -1, HEADS, CHANNELS // HEADS), perm=order)


def draw(path: Path, *, dtype: type[np.generic] = np.float16, side: int | str = SIDE) -> Path:
    """One block of a UNet: two GroupNorms, one of them with a SiLU behind it, and an attention."""
    graph = Drawn(dtype)
    x = graph.conv(graph.silu(graph.group_norm(graph.conv("x", 4))), CHANNELS)
    last = graph.node("Transpose", graph.group_norm(x), perm=[0, 2, 3, 1])
    output = graph.attention(graph.reshape(last, 0, -1, CHANNELS))
    return save(path, graph, {"x": ["R", 4, side, side]}, {output: ["R", "tokens", CHANNELS]})


def save(path: Path, graph: Drawn, inputs: dict[str, list[Any]], outputs: dict[str, list[Any]]) -> Path:
    kind = TensorProto.FLOAT16 if graph.dtype is np.float16 else TensorProto.FLOAT
    ins, outs = (
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in ports.items()]
        for ports in (inputs, outputs)
    )
    model = helper.make_model(
        helper.make_graph(graph.nodes, "g", ins, outs, graph.weights), opset_imports=[helper.make_opsetid("", 20)]
    )
    model.ir_version = 10
    onnx.save(model, path)
    return path


def rows(most: int, least_side: int = SIDE, most_side: int = SIDE) -> Ranges:
    largest = (most, 4, most_side, most_side)
    return {"x": ((1, 4, least_side, least_side), largest, largest)}


MANY = [rows(most) for most in range(1, 13)]  # whose build takes long enough to be interrupted
