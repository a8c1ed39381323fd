"""What callers ask for: one kind of request, or a weighted mix of them from a file of JSON lines. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtest.provenance import Fact

_SEEDS = 2**32  # the server reads as many bits
_LONG = 300  # characters of a field that are kept in results


class MixError(ValueError):
    """A line of a mix that cannot be sent; the message says which, and why."""


class Entry(Fact):
    """One kind of request."""

    name: str  # "line 3", or what the command line said
    weight: float
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Mix:
    """Kinds of requests. The same seed draws the same callers, whenever they come."""

    entries: tuple[Entry, ...]
    seed: int

    def pick(self, number: int) -> int:
        """The index of the entry that caller `number` sends."""
        shares = np.cumsum([entry.weight for entry in self.entries])
        place = np.random.default_rng((self.seed, number)).random() * shares[-1]
        return int(np.searchsorted(shares, place, side="right"))

    def fields(self, index: int, number: int) -> dict[str, Any]:
        """The body that caller `number` sends. Seeds differ, so that no two ask for the same picture."""
        return {"seed": (self.seed * 1_000_003 + number) % _SEEDS, **self.entries[index].fields}

    def mean(self, values: Sequence[float]) -> float:
        """The weighted mean of a value for each entry."""
        return float(np.average(values, weights=[entry.weight for entry in self.entries]))


def plain_entries(prompts: Sequence[str], *, steps: int | None) -> tuple[Entry, ...]:
    """An entry for each prompt, all of the same steps; the server's own number where None."""
    more = {} if steps is None else {"num_inference_steps": steps}
    return tuple(Entry(name=f"prompt {prompt!r}", weight=1, fields={"prompt": prompt, **more}) for prompt in prompts)


def read_entries(text: str) -> tuple[Entry, ...]:
    """The entries of a file: on each line a JSON object of a request's fields, and a `weight` if it is not 1.

    What fields mean is the server's to judge, which is asked once for each entry before any load. Raises MixError.
    """
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise MixError("The mix is empty: write a JSON object of a request's fields on each line.")
    return tuple(_entry(number, line) for number, line in lines)


def abridged(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` as they are kept: without the megabytes of a picture."""
    return {
        name: f"({len(value)} characters)" if isinstance(value, str) and len(value) > _LONG else value
        for name, value in fields.items()
    }


def _entry(number: int, line: str) -> Entry:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise MixError(f"Line {number} of the mix is no JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise MixError(f'Line {number} of the mix is no JSON object: write {{"prompt": "…"}}.')
    weight = fields.pop("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise MixError(f"Line {number} of the mix: weight is {weight!r}, and has to be a number above 0.")
    if "prompt" not in fields:
        raise MixError(f"Line {number} of the mix has no prompt.")
    return Entry(name=f"line {number}", weight=weight, fields=fields)
