"""What a bisection found, and what to do about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engines.contract import GraphName
from engines.manifest import Precision

_LARGEST_FP16 = 65504
_JUMP = 3  # the error of a layer that is at fault is so many times that of what it is computed from, or more


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor, by the node that writes it."""

    tensor: str
    node: str
    operator: str
    scope: str  # the module whose weights the node reads; `after …` where it reads none

    def __str__(self) -> str:
        return f"{self.operator} {self.node} ({self.scope})"


@dataclass(frozen=True, slots=True)
class Reading:
    """One tensor of an engine, compared with FP32."""

    error: float  # the largest absolute difference; NaN or infinite where the engine's values are
    expected: float  # the largest magnitude in FP32
    computed: float  # and in the engine
    passed: bool

    @property
    def relative(self) -> float:
        """The error relative to the range."""
        return self.error / max(self.expected, 1e-6)


@dataclass(frozen=True, slots=True)
class Row:
    """A tensor near the first that differs."""

    place: Place
    reading: Reading


@dataclass(frozen=True, slots=True)
class Finding:
    """Where one graph of a backend strays from FP32.

    Attributes:
        graph: the graph.
        backend: the backend's name.
        inputs: what it strays on, for people.
        first: the first tensor that differs; None where nothing does once tensors are marked.
        rows: the tensors around it, in topological order.
        advice: the likely reason, and what to do.
        rounds: how often a marked engine was built and run.
    """

    graph: GraphName
    backend: str
    inputs: str
    first: Place | None
    rows: tuple[Row, ...]
    advice: str
    rounds: int


def advice_for(backend: str, precision: Precision, first: Reading, before: list[Reading]) -> str:
    """The likely reason why `first` differs, after what it is computed from did as `before`."""
    wider = "fp32" if precision == "bf16" else "bf16, or fp32"
    reached = f"FP32 reaches {first.expected:.2g} here"
    if precision == "fp16" and first.expected > _LARGEST_FP16:
        return f"overflow: fp16 ends at {_LARGEST_FP16}, and {reached}: compile with --precision {wider}."
    if not math.isfinite(first.computed):
        return f"{backend} computes NaN or infinity, and {reached}: {_remedy(precision, wider)}."
    earlier = max((reading.relative for reading in before), default=0.0)
    if precision != "fp32" and earlier * _JUMP > first.relative:
        return f"the error grows from layer to layer, and none is at fault: compile with --precision {wider}."
    return (
        f"the error is {first.relative:.1e} of the range here, and {earlier:.1e} before: either the engine has other "
        f"weights here than the FP32 graph, or {backend} computes this layer wrongly; {_remedy(precision, wider)}."
    )


def _remedy(precision: Precision, wider: str) -> str:
    return "compile for another --backend" if precision == "fp32" else f"compile with --precision {wider}"


def vanished(backend: str) -> str:
    """The advice where an engine agrees once tensors are marked."""
    return (
        f"with tensors marked as outputs the engine agrees: a marked engine fuses less, so a fusion of {backend} is at "
        "fault, or its choice of kernels. Compile again (with tensorrt at another --optimization-level), and report it "
        f"to the makers of {backend}."
    )
