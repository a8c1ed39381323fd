"""Large parts keep their weights in the checkpoint's file, in its type; each layer widens its own while it computes.

What is mapped from a file takes no memory of its own, so a UNet of 2.6 billion weights loads in seconds. Results are
those of weights in FP32: widening is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from engines.checkpoints.checkpoint import LARGE_PART

LARGE_WEIGHT = 2**18  # values; smaller tensors are a thousandth of a large part, and are in FP32
_HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}


def type_to_load(files: Iterable[Path]) -> torch.dtype:
    """The type that a part is loaded in: that of its files where they are large and in 16 bits, FP32 otherwise."""
    found, weights = set[str](), 0
    for path in files:
        if path.suffix != ".safetensors":
            return torch.float32
        with safe_open(path, framework="pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 - no mapping
            found |= {one.get_dtype() for one in slices}
            weights += sum(math.prod(one.get_shape()) for one in slices)
    if len(found) != 1 or weights < LARGE_PART:
        return torch.float32
    return _HALVES.get(found.pop(), torch.float32)


def widen(module: nn.Module) -> None:
    """Let a module in 16 bits compute in FP32, without ever holding more than a layer's weights so."""
    for layer in module.modules():
        for name, weight in layer.named_parameters(recurse=False):
            if weight.dtype == torch.float32:
                continue
            if name == "weight" and weight.numel() >= LARGE_WEIGHT and type(layer) in _WIDENED:
                layer.__class__ = _WIDENED[type(layer)]
            else:
                weight.data = weight.data.float()


def narrow(module: nn.Module) -> None:
    """Let a module compute in the types of its weights again."""
    for layer in module.modules():
        if isinstance(layer, _Widened):
            layer.__class__ = type(layer).__bases__[1]


class _Widened(nn.Module):
    """A layer whose weights are in FP32 while it computes."""

    weight: Tensor

    def forward(self, *given: Tensor) -> Tensor:
        stored = self.weight
        self.weight = nn.Parameter(stored.float(), requires_grad=False)
        try:
            made: Tensor = super().forward(*given)
        finally:
            self.weight = stored
        return made


class _Linear(_Widened, nn.Linear): ...


class _Conv2d(_Widened, nn.Conv2d): ...


class _Embedding(_Widened, nn.Embedding): ...


_WIDENED: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _Linear,
    nn.Conv2d: _Conv2d,
    nn.Embedding: _Embedding,
}
