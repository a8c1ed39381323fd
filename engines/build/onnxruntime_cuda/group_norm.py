"""Group normalisation, with the SiLU that follows it, as one `com.microsoft.GroupNorm`."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern

from engines.build.onnxruntime_cuda.values import FIRST, LAST, MICROSOFT, constant, made_by, rank, size

# What ONNX Runtime's kernel supports: threads take two channels of a group each, and a block takes whole groups.
_CHANNELS_OF_THREAD = 2
_CHANNELS_OF_BLOCK = 512


class _GroupNorm(pattern.RewriteRuleClassBase):  # type: ignore[misc] # onnxscript has no types
    """Group normalisation as torch's exporter writes it: of groups as instances, scaled and shifted by channel.

    The image is [B, C, H, W], or [B, C, H·W] where it was reshaped to that.
    """

    activation = 0

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)  # shapes are computed from values inside the pattern
        self._numbers = itertools.count(1)

    def pattern(  # noqa: PLR0913, PLR0917 - named by the pattern
        self, op: Any, image: Any, groups: Any, ones: Any, zeros: Any, gamma: Any, beta: Any, epsilon: Any
    ) -> Any:
        grouped = op.Reshape(image, groups)
        normal = op.Reshape(op.InstanceNormalization(grouped, ones, zeros, epsilon=epsilon), pattern.ANY_VALUE)
        return self._activated(op, op.Add(op.Mul(normal, gamma), beta))

    def _activated(self, op: Any, normal: Any) -> Any:  # noqa: ARG002 - the other rule's
        return normal

    def check(self, _context: Any, image: ir.Value, **found: ir.Value) -> Any:
        result = pattern.MatchResult()
        channels, groups = size(image, 1), size(found["ones"], 0)
        if channels is None or groups is None or _image(image) is None:
            return result.fail("it is not an image [B, C, H, W]")
        if not _is(found["ones"], 1) or not _is(found["zeros"], 0) or not _groups(found["groups"], groups):
            return result.fail("it does not normalise groups")
        if not _by_channel(found["gamma"], image) or not _by_channel(found["beta"], image):
            return result.fail("it is not scaled by channel")
        if not is_supported(channels, groups):
            return result.fail(f"{channels} channels in {groups} groups")
        return result

    def rewrite(
        self, op: Any, image: ir.Value, ones: ir.Value, gamma: ir.Value, beta: ir.Value, epsilon: ir.Attr, **_: Any
    ) -> Any:
        whole = _image(image) or image
        made = op.GroupNorm(
            op.Transpose(whole, perm=LAST),
            op.initializer(self._vector(gamma)),
            op.initializer(self._vector(beta)),
            activation=self.activation,
            channels_last=1,
            epsilon=epsilon.as_float(),
            groups=size(ones, 0),
            _domain=MICROSOFT,
        )
        first = op.Transpose(made, perm=FIRST)
        first.shape, first.type = whole.shape, whole.type
        flat = made_by(image, "Reshape") if rank(image) == 3 else None
        return op.Reshape(first, flat.inputs[1], allowzero=1) if flat else first

    def _vector(self, value: ir.Value) -> ir.TensorProtocol:
        """Scales or shifts [C], which the kernel takes in FP32. Several norms may share one value: names differ."""
        array = constant(value)
        assert array is not None  # noqa: S101 - checked
        name = f"{value.name}.channels{self.activation}.{next(self._numbers)}"
        return ir.tensor(array.astype(np.float32).reshape(-1), name=name)


class _GroupNormSilu(_GroupNorm):
    activation = 1

    def _activated(self, op: Any, normal: Any) -> Any:
        return op.Mul(normal, op.Sigmoid(normal))


def is_supported(channels: int, groups: int) -> bool:
    """Whether ONNX Runtime's kernel computes groups of that many channels."""
    width = channels // groups
    return channels % groups == 0 and width % _CHANNELS_OF_THREAD == 0 and width <= _CHANNELS_OF_BLOCK


def _image(value: ir.Value) -> ir.Value | None:
    """The value itself if it is [B, C, H, W], or that which was reshaped to it, a [B, C, H·W]."""
    if rank(value) == 4:
        return value
    flat = made_by(value, "Reshape") if rank(value) == 3 else None
    source = flat.inputs[0] if flat else None
    return source if rank(source) == 4 and size(source, 1) == size(value, 1) else None


def _is(value: ir.Value, number: float) -> bool:
    array = constant(value)
    return array is not None and array.ndim == 1 and bool((array == number).all())


def _groups(shape: ir.Value, groups: int) -> bool:
    array = constant(shape)
    return array is not None and array.tolist() == [0, groups, -1]


def _by_channel(value: ir.Value, image: ir.Value) -> bool:
    """Whether it is a constant [C, 1, ...], which broadcasts over the image's pixels."""
    array = constant(value)
    return array is not None and array.shape == (size(image, 1), *[1] * ((rank(image) or 0) - 2))


def fuse_group_norm(model: ir.Model) -> int:
    """Replace every group normalisation that ONNX Runtime's kernel supports. Returns how many were replaced."""
    replaced: int = pattern.RewriteRuleSet([_GroupNormSilu.rule()]).apply_to_model(model)
    return replaced + int(pattern.RewriteRuleSet([_GroupNorm.rule()]).apply_to_model(model))
