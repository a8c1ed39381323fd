"""Large parts keep their weights in the checkpoint's file, in its type; each layer widens its own while it computes.

What is mapped from a file takes no memory of its own, so a UNet of 2.6 billion weights loads in seconds. Results are
those of weights in FP32: widening is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from engines.checkpoints.checkpoint import LARGE_PART
from engines.safetensors_header import read_header

LARGE_WEIGHT = 2**18  # values; smaller tensors are a thousandth of a large part, and are in FP32
_HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}


def type_to_load(files: Sequence[Path]) -> torch.dtype:
    """The type that a part is loaded in: that of its files where they are large and in 16 bits, FP32 otherwise.

    Raises:
        CheckpointError: a file is damaged.
    """
    if any(path.suffix != ".safetensors" for path in files):
        return torch.float32
    shapes = [shape for path in files for shape in read_header(path)[0].values()]
    if sum(map(math.prod, shapes)) < LARGE_PART:
        return torch.float32
    found = {dtype for path in files for dtype in _types(path)}
    return _HALVES.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def _types(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping


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
