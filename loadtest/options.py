"""The options of Locust's command line that say what is sent, and argparse types for numbers and sizes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from engines.manifest import Size
from loadtest.response_formats import RESPONSE_FORMATS

BOTH_GIVEN = "--mix gives all fields of a request itself: omit --prompt, --steps, --model and --lora"


def add_request_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that say what is sent. Their values are plain, because Locust sends them to its workers."""
    add = group.add_argument
    add(
        "--format",
        dest="response_format",
        choices=RESPONSE_FORMATS,
        default="json",
        help="response format to request (default: %(default)s)",
    )
    add("--prompt", action="append", default=[], help="may be repeated (default: the model's examples)")
    add("--steps", type=count, metavar="N", help="denoising steps (default: the model's)")
    add("--model", action="append", default=[], help="may be repeated, for a mix of models (default: the server's)")
    add("--lora", action="append", default=[], metavar="NAME[:WEIGHT]", help="may be repeated: each request has one")
    add("--mix", metavar="FILE", help="JSON lines: the fields of a request, and its weight if it is not 1")
    add("--seed", type=_seed, default=0, help="seed of the arrivals and of the images (default: %(default)s)")


def count(text: str) -> int:
    """Parse a whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def size(text: str) -> Size:
    """Parse WIDTHxHEIGHT, pixels."""
    if not (found := re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write WIDTHxHEIGHT, such as 512x512")
    return Size(width=int(found[1]), height=int(found[2]))


def positive(text: str) -> float:
    """Parse a finite number above 0."""
    return number(text, lambda value: value > 0, "above 0")


def number(text: str, is_valid: Callable[[float], bool], bound: str) -> float:
    """Parse a finite number for which `is_valid` holds; `bound` names that condition in the error."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not is_valid(value) or value == float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {bound}")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)
