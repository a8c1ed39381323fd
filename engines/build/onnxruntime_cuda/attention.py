"""Attention as one `com.microsoft.MultiHeadAttention`, whose kernels never write the scores to memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern

from engines.build.onnxruntime_cuda.values import MICROSOFT, constant, made_by, rank, scalar, size

# Beyond it flash attention does not apply, and the memory-efficient kernel that ONNX Runtime takes instead may need
# more shared memory than the GPU has (microsoft/onnxruntime#28388). The VAE's head of 512 channels stays as it is.
LARGEST_HEAD = 256
_HIDDEN = -1e4  # a score that softmax turns into 0


class _Attention(pattern.RewriteRuleClassBase):  # type: ignore[misc] # onnxscript has no types
    """Scaled dot-product attention as torch's exporter writes it, from three projections [B, S, heads·channels]."""

    masked = False

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)  # shapes are computed from values inside the pattern

    def pattern(  # noqa: PLR0913, PLR0917 - named by the pattern
        self, op: Any, query: Any, key: Any, value: Any, query_scale: Any, key_scale: Any, mask: Any
    ) -> Any:
        any_shape = pattern.ANY_VALUE
        q = op.Transpose(op.Reshape(query, any_shape, _outputs=["heads"]), perm=[0, 2, 1, 3])
        k = op.Transpose(op.Reshape(key, any_shape, _outputs=["key_heads"]), perm=[0, 2, 1, 3])
        v = op.Transpose(op.Reshape(value, any_shape, _outputs=["value_heads"]), perm=[0, 2, 1, 3])
        flat = op.Transpose(op.Reshape(k, any_shape), perm=[0, 2, 1])
        turned = op.Reshape(flat, any_shape)
        scores = op.MatMul(op.Mul(q, query_scale), op.Mul(turned, key_scale))
        weights = self._weights(op, scores, mask)
        return op.Reshape(op.Transpose(op.MatMul(weights, v), perm=[0, 2, 1, 3]), any_shape, _outputs=["made"])

    def _weights(self, op: Any, scores: Any, mask: Any) -> Any:  # noqa: ARG002 - the other rule's
        return op.Softmax(scores, axis=-1)

    def check(self, _context: Any, **found: ir.Value) -> Any:
        result = pattern.MatchResult()
        heads, channels = size(found["heads"], 2), size(found["heads"], 3)
        if heads is None or channels is None or channels > LARGEST_HEAD:
            return result.fail(f"heads of {channels} channels")
        if any(
            size(found[name], 2) != heads or size(found[name], 3) != channels for name in ("key_heads", "value_heads")
        ):
            return result.fail("queries, keys and values differ in their heads")
        widths = {(rank(found[name]), size(found[name], 2)) for name in ("query", "key", "value", "made")}
        if widths != {(3, heads * channels)}:
            return result.fail("it is not [B, S, heads·channels]")
        if scalar(found["query_scale"]) is None or scalar(found["key_scale"]) is None:
            return result.fail("the scale is not constant")
        if self.masked and not _is_causal(found["mask"]):
            return result.fail("the mask is not causal")
        return result

    def rewrite(self, op: Any, query: ir.Value, key: ir.Value, value: ir.Value, **found: ir.Value) -> Any:
        scale = (scalar(found["query_scale"]) or 1) * (scalar(found["key_scale"]) or 1)
        return op.MultiHeadAttention(
            query,
            key,
            value,
            num_heads=size(found["heads"], 2),
            scale=scale,
            unidirectional=int(self.masked),
            _domain=MICROSOFT,
        )


class _CausalAttention(_Attention):
    """Attention of text encoders: no token attends to later ones."""

    masked = True

    def _weights(self, op: Any, scores: Any, mask: Any) -> Any:
        weights = op.Softmax(op.Add(scores, mask), axis=-1)
        # torch writes zeros for rows in which every score is masked; a causal mask has none.
        return pattern.OrValue([op.Where(op.IsNaN(weights), pattern.ANY_VALUE, weights), weights])


def _is_causal(mask: ir.Value) -> bool:
    """Whether a mask [B, 1, S, S] is 0 where a token is not later than the one that attends, and hides it otherwise."""
    chosen = made_by(mask, "Where")
    if chosen is None:
        return False
    expanded = made_by(chosen.inputs[0], "Expand")
    visible = constant(expanded.inputs[0] if expanded else chosen.inputs[0])
    shown, hidden = scalar(chosen.inputs[1]), scalar(chosen.inputs[2])
    if visible is None or visible.ndim < 2 or shown != 0 or hidden is None or hidden > _HIDDEN:
        return False
    return bool((visible == np.tril(np.ones(visible.shape[-2:], bool))).all())


def fuse_attention(model: ir.Model) -> int:
    """Replace every attention that ONNX Runtime's kernels support. Returns how many were replaced."""
    rules = pattern.RewriteRuleSet([_Attention.rule(), _CausalAttention.rule()])
    replaced: int = rules.apply_to_model(model)
    return replaced
