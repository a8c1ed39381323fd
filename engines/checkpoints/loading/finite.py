"""Weights that are NaN or infinite make every image fail: they are found right after loading, in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from engines.errors import CheckpointError


def check_finite(tensors: Iterable[tuple[str, Tensor]], file: str) -> None:
    """Raise CheckpointError, which names `file` and the tensor, where one of the named `tensors` is not finite."""
    for name, tensor in tensors:
        if not is_finite(tensor):
            raise CheckpointError(f"{file} holds NaN or infinity in {name}: it is damaged. Download it again.")


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, without a mask as large as the tensor."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    values = tensor.detach()
    wide = values.float() if values.element_size() == 1 else values  # torch compares no FP8
    return all(math.isfinite(float(end)) for end in wide.aminmax())
