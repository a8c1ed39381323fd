"""What both commands, `python -m loadtest` and Locust's, are told of the requests to send."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from engines.manifest import Size
from loadtest.mix import Entry, plain_entries, read_entries
from loadtest.response_formats import FACES


def add_what(group: argparse._ArgumentGroup) -> None:
    """Plain values only: Locust sends them to its workers."""
    add = group.add_argument
    add("--face", choices=FACES, default="json", help="how pictures are asked for (default: %(default)s)")
    add("--prompt", action="append", default=[], help="may be given several times (default: the model's examples)")
    add("--steps", type=count, metavar="N", help="denoising steps (default: the model's)")
    add("--mix", metavar="FILE", help="JSON lines: fields of a request, and its weight if that is not 1")
    add("--seed", type=_seed, default=0, help="of the callers and their pictures (default: %(default)s)")


def conflict(given: argparse.Namespace) -> str | None:
    """What is wrong with options that are each right."""
    if given.mix and (given.prompt or given.steps):
        return "--mix says prompts and steps itself: leave out --prompt and --steps"
    return None


def entries_of(given: argparse.Namespace, examples: Callable[[], Sequence[str]]) -> tuple[Entry, ...]:
    """What is sent: a mix, prompts, or the served model's own `examples`. Raises MixError, OSError."""
    if given.mix:
        return read_entries(Path(given.mix).read_text(encoding="utf-8"))
    prompts = given.prompt or tuple(examples()[:8]) or ("a picture",)
    return plain_entries(prompts, steps=given.steps)


def count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def size(text: str) -> Size:
    if not (found := re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write WIDTHxHEIGHT, such as 512x512")
    return Size(width=int(found[1]), height=int(found[2]))


def positive(text: str) -> float:
    return number(text, lambda value: value > 0, "above 0")


def number(text: str, holds: Callable[[float], bool], bound: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not holds(value) or value == float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number {bound}")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 0 or more")
    return int(text)
