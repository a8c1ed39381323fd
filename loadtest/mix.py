"""The mix of requests: one entry for each kind, drawn by weight, from prompts or a file of JSON lines. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
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


@dataclass(frozen=True, slots=True)
class Wanted:
    """What requests without a mix have: an entry is made for each prompt with each model and each LoRA."""

    prompts: Sequence[str] = ()  # without any, the model's examples
    steps: int | None = None  # the server's default where None
    models: Sequence[str] = ()  # without any, the server's default
    loras: Sequence[str] = ()  # NAME, or NAME:WEIGHT; without any, none

    def __bool__(self) -> bool:
        return any((self.prompts, self.steps, self.models, self.loras))


def choose_entries(
    mix: str | Path | None, wanted: Wanted, *, examples: Callable[[], Sequence[str]]
) -> tuple[MixEntry, ...]:
    """Return the entries of a mix's file, or those wanted, with the served model's `examples` without a prompt.

    Raises MixError, OSError.
    """
    if mix:
        return read_entries(Path(mix).read_text(encoding="utf-8"))
    prompts = wanted.prompts or tuple(examples()[:_MAX_EXAMPLES]) or ("a picture",)
    return plain_entries(replace(wanted, prompts=prompts))


def plain_entries(wanted: Wanted) -> tuple[MixEntry, ...]:
    """Return an entry for each prompt, model and LoRA, all with the same number of steps."""
    more = {} if wanted.steps is None else {"num_inference_steps": wanted.steps}
    chosen = product(wanted.prompts, wanted.models or [""], wanted.loras or [""])
    return tuple(_plain_entry(*one, more) for one in chosen)


def _plain_entry(prompt: str, model: str, lora: str, more: Mapping[str, Any]) -> MixEntry:
    """Return the entry of a prompt, with a model and a LoRA where they are not empty."""
    fields: dict[str, Any] = {"prompt": prompt, **more}
    named = [f"prompt {prompt!r}"]
    if model:
        fields["model"] = model
        named.append(f"model {model}")
    if lora:
        fields["loras"] = [_lora(lora)]
        named.append(f"LoRA {lora}")
    return MixEntry(name=", ".join(named), weight=1, fields=fields)


def _lora(text: str) -> dict[str, Any]:
    """Parse NAME or NAME:WEIGHT as a request's field has it."""
    name, _, weight = text.rpartition(":")
    try:
        return {"name": name, "weight": float(weight)} if name else {"name": text}
    except ValueError:
        return {"name": text}


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
