"""Tags of LoRAs in a prompt, in the grammar of AUTOMATIC1111's web UI: `<lora:style:0.8>`.

There they are taken out of the prompt alone, before anything else of it is read. In the negative prompt they are text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from server.requests.errors import FieldError, InvalidRequest
from server.requests.prompts import excerpt

MAX_LORA_WEIGHT = 10.0  # the largest absolute weight
_TAG = re.compile(r"<(?:lora|lyco):(?P<content>[^<>]++)>", re.IGNORECASE)
_NAMES = ("te", "unet")  # of weights; others change how a LoRA is applied
_FORM = "write <lora:NAME:0.8>"


class LoraTag(NamedTuple):
    """A LoRA that a prompt names."""

    name: str  # as it is written
    weight: float


def without_tags(prompt: str) -> str:
    """`prompt` as it is encoded."""
    return _TAG.sub("", prompt)


def tags_in(prompt: str) -> list[LoraTag]:
    """The tags of `prompt`. Raises InvalidRequest for one whose weight cannot be followed."""
    return [_read(tag[0], tag["content"]) for tag in _TAG.finditer(prompt)]


def tag_of(name: str, weight: float) -> str:
    """The tag that names a LoRA: <lora:style:0.8>."""
    return f"<lora:{name}:{repr(weight).removesuffix('.0')}>"


def can_be_named(name: str) -> bool:
    """Whether a tag can have this name."""
    tag = _TAG.fullmatch(f"<lora:{name}>")
    return bool(tag) and name == name.strip() and ":" not in name and name.isprintable()


def _read(tag: str, content: str) -> LoraTag:
    name, *values = content.split(":")
    weights = _weights(tag, values)
    if len(set(weights)) > 1:
        raise _refused(tag, f"weights of the text encoder and the UNet cannot differ: {_FORM}")
    return LoraTag(name.strip(), next(iter(weights), 1.0))


def _weights(tag: str, values: Sequence[str]) -> list[float]:
    """Those of the text encoder and the UNet, as far as they are given: by position, or by name."""
    weights = []
    for value in values:
        name, equals, number = value.rpartition("=")
        if equals and name.strip() not in _NAMES:
            raise _refused(tag, f"{excerpt(name)} is not supported: {_FORM}")
        weights.append(_number(tag, number))
    if len(weights) > len(_NAMES):
        raise _refused(tag, f"it has {len(weights)} weights: {_FORM}")
    return weights


def _number(tag: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) <= MAX_LORA_WEIGHT:
        raise _refused(tag, f"its weight is not a number from -{MAX_LORA_WEIGHT:g} to {MAX_LORA_WEIGHT:g}: {_FORM}")
    return number


def _refused(tag: str, why: str) -> InvalidRequest:
    message = f'"{excerpt(tag)}": {why}.'
    return InvalidRequest(message, fields=(FieldError("prompt", message),))
