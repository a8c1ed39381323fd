"""The mix of requests: one entry for each kind, drawn by weight, from prompts or a file of JSON lines. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.provenance import ResultModel

_SEEDS = 2**32  # the range of the server's seeds
_LONG_FIELD = 300  # characters; longer values are left out of results
_MAX_EXAMPLES = 8


class MixError(ValueError):
    """A mix that cannot be sent; the message says which line, and why."""


class MixEntry(ResultModel):
    """One kind of request."""

    name: str  # "line 3" of a file, or the prompt
    weight: float
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Mix:
    """Weighted kinds of requests. Request `number` has the same entry and fields for the same seed."""

    entries: tuple[MixEntry, ...]
    seed: int

    def pick(self, number: int) -> int:
        """Return the index of the entry of request `number`."""
        shares = np.cumsum([entry.weight for entry in self.entries])
        place = np.random.default_rng((self.seed, number)).random() * shares[-1]
        return int(np.searchsorted(shares, place, side="right"))

    def fields(self, index: int, number: int) -> dict[str, Any]:
        """Return the body of request `number`. Image seeds differ, so that no two requests have the same image."""
        return {"seed": (self.seed * 1_000_003 + number) % _SEEDS, **self.entries[index].fields}

    def mean(self, values: Sequence[float]) -> float:
        """Return the weighted mean of one value for each entry."""
        return float(np.average(values, weights=[entry.weight for entry in self.entries]))


def choose_entries(
    mix: str | Path | None, prompts: Sequence[str], steps: int | None, *, examples: Callable[[], Sequence[str]]
) -> tuple[MixEntry, ...]:
    """Return the entries of a mix's file, of the prompts, or of the served model's `examples`.

    Raises MixError, OSError.
    """
    if mix:
        return read_entries(Path(mix).read_text(encoding="utf-8"))
    return plain_entries(prompts or tuple(examples()[:_MAX_EXAMPLES]) or ("a picture",), steps=steps)


def plain_entries(prompts: Sequence[str], *, steps: int | None) -> tuple[MixEntry, ...]:
    """Return an entry for each prompt, all with the same number of steps; the server's default where None."""
    more = {} if steps is None else {"num_inference_steps": steps}
    return tuple(MixEntry(name=f"prompt {prompt!r}", weight=1, fields={"prompt": prompt, **more}) for prompt in prompts)


def read_entries(text: str) -> tuple[MixEntry, ...]:
    """Parse a mix: on each line a JSON object of a request's fields, and its `weight` if it is not 1.

    The fields themselves are validated by the server, to which each entry is sent once before any load.
    Raises MixError.
    """
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise MixError("The mix is empty: write a JSON object of a request's fields on each line.")
    return tuple(_entry(number, line) for number, line in lines)


def abridged(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return `fields` for the results, with long strings such as base64 images replaced by their length."""
    return {
        name: f"({len(value)} characters)" if isinstance(value, str) and len(value) > _LONG_FIELD else value
        for name, value in fields.items()
    }


def _entry(number: int, line: str) -> MixEntry:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise MixError(f"Line {number} of the mix is not valid JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise MixError(f'Line {number} of the mix is not a JSON object: write {{"prompt": "…"}}.')
    weight = fields.pop("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise MixError(f"Line {number} of the mix: weight is {weight!r}; it must be a number above 0.")
    if "prompt" not in fields:
        raise MixError(f"Line {number} of the mix has no prompt.")
    return MixEntry(name=f"line {number}", weight=weight, fields=fields)
