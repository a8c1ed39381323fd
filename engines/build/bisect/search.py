"""The bisection, over any tensors that can be measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

MARKS = 16  # tensors measured at once: each marked tensor keeps its memory, and may break a fusion

Passes = Callable[[Sequence[str]], Mapping[str, bool]]  # of tensors: which of them agree


def first_divergent(ancestors: Mapping[str, int], outputs: Sequence[str], passes: Passes) -> str:
    """The first tensor in topological order that differs, among those that lead to the `outputs` that do.

    Tensors that lead to one that agrees are taken to agree. In each round a few of the others are measured, evenly
    spread: those of large blocks first, then inside the first block that differs.

    Args:
        ancestors: every tensor in topological order, and those that lead to it, itself included, as a bit set.
        outputs: the tensors among them that are known to differ, one at least.
        passes: measures some tensors.
    """
    names = list(ancestors)
    place = {name: index for index, name in enumerate(names)}
    first, suspects = min(place[name] for name in outputs), 0
    for name in outputs:
        suspects |= ancestors[name]
    while candidates := [index for index in range(first) if suspects >> index & 1]:
        marks = [names[index] for index in _spread(candidates)]
        for name, agrees in passes(marks).items():
            suspects &= ~(ancestors[name] if agrees else 1 << place[name])
            first = first if agrees else min(first, place[name])
    return names[first]


def _spread(candidates: Sequence[int]) -> list[int]:
    """At most `MARKS` of them, evenly, with the last."""
    count = min(MARKS, len(candidates))
    return [candidates[len(candidates) * (number + 1) // count - 1] for number in range(count)]
