"""What is known of a graph's values before it runs: constants, ranks and sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from engines.contract import Array

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
FIRST, LAST = (0, 3, 1, 2), (0, 2, 3, 1)  # permutations to channels first, NCHW, and to channels last, NHWC


def constant(value: ir.Value | None) -> Array | None:
    """The values of a constant, through a cast if there is one; None where it is not constant."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    return constant(node.inputs[0]) if node is not None and is_op(node, "Cast") else None


def scalar(value: ir.Value | None) -> float | None:
    """The value of a constant of one element; None for anything else."""
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def given(node: ir.Node, index: int) -> ir.Value:
    """An input that the operator requires."""
    value = node.inputs[index]
    assert value is not None  # noqa: S101 - graphs that the checker passed have it
    return value


def rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def size(value: ir.Value | None, axis: int) -> int | None:
    """The size of an axis; None where the axis does not exist, or varies between calls."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    found = value.shape[axis]
    return found if isinstance(found, int) else None


def is_op(node: ir.Node | None, op_type: str) -> bool:
    """Whether `node` is that operator of ONNX."""
    return node is not None and node.domain == "" and node.op_type == op_type


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that computes `value`, if it is that operator of ONNX."""
    node = None if value is None else value.producer()
    return node if is_op(node, op_type) else None


def permutation(node: ir.Node) -> tuple[int, ...]:
    """Of a Transpose; empty where it is left out."""
    return tuple(node.attributes.get_ints("perm", ()))


def int64(values: Sequence[int]) -> Array:
    return np.array(values, np.int64)
