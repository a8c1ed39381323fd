"""TensorRT's log of a build."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engines.build.trt.layers import EngineLayer, is_layer_table, logged_layers

_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|insufficient memory|could not be allocated", re.IGNORECASE)
_INT64 = "has Int64 binding"  # logged for every index input, which are Int64 on purpose
_NO_DRIVER = "cudaError 35"  # follows every error of TensorRT for RTX without a driver, which it does not need


@dataclass(slots=True)
class BuildLog:
    """The parts of TensorRT's log that are used: warnings, the last errors, the engine's layers and their memory."""

    warn: Callable[[str], None]
    layers: list[EngineLayer] = field(default_factory=list)
    activations: list[int] = field(default_factory=list)  # bytes, by profile
    _warned: set[str] = field(default_factory=set)
    _errors: deque[str] = field(default_factory=lambda: deque(maxlen=20))

    def write(self, severity: Any, text: str) -> None:
        """Take one message. TensorRT calls this from its own threads."""
        if severity <= severity.ERROR:
            self._errors.append(text.strip())
        elif severity == severity.WARNING:
            if _INT64 not in text and text not in self._warned:  # some come once for every layer
                self._warned.add(text)
                self.warn(text.strip())
        elif is_layer_table(text):
            self.layers = logged_layers(text)
        elif found := _ACTIVATIONS.search(text):
            self.activations.append(int(found[1]))

    def reasons(self) -> str:
        """The last errors, oldest first; empty if there were none."""
        errors = [text for text in self._errors if _NO_DRIVER not in text]
        return "; ".join((errors or list(self._errors))[-3:])


def is_out_of_memory(reasons: str) -> bool:
    """Whether errors of TensorRT say that memory was full."""
    return bool(_OUT_OF_MEMORY.search(reasons))
