"""The early package `lora` by cloneofsimo, whose files number the layers instead of naming them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from engines.errors import CheckpointError
from engines.manifest import LoraPart

LEARNED = "<embed>"  # the metadata of a token that was trained with a LoRA, and lies in the same file
_LONGEST_CLASS = 100  # characters of what a message repeats of the file
# Layers within what the package calls by these class names, in the order of its numbers.
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT = ("k_proj", "v_proj", "q_proj", "out_proj")
_CLASSES: Mapping[LoraPart, frozenset[str]] = {
    "unet": frozenset({"CrossAttention", "Attention", "GEGLU"}),
    "text_encoder": frozenset({"CLIPAttention"}),
}


def early_names(part: LoraPart, layers: Iterable[str], metadata: Mapping[str, str]) -> Sequence[str]:
    """The layers in the order of their numbers, as diffusers 0.10 made them: the middle block is the last.

    Args:
        part: the one that the layers are in.
        layers: the names of its layers, in the order of its modules.
        metadata: the file's.

    Raises:
        CheckpointError: the file has numbered layers within classes whose order is not known.
    """
    classes = _classes(part, metadata)
    return tuple(_unet(layers, classes) if part == "unet" else _text_encoder(layers, classes))


def _unet(layers: Iterable[str], classes: frozenset[str]) -> Iterator[str]:
    attends = classes & {"CrossAttention", "Attention"}
    for block in sorted(_owners(layers, r"(.*\.transformer_blocks\.\d+)\..*"), key=_place):
        yield from (f"{block}.attn1.{layer}" for layer in _ATTENTION if attends)
        yield from (f"{block}.ff.net.0.proj" for _ in classes & {"GEGLU"})
        yield from (f"{block}.attn2.{layer}" for layer in _ATTENTION if attends)


def _place(name: str) -> int:
    return ("down_blocks", "up_blocks", "mid_block").index(name.split(".", maxsplit=1)[0])


def _text_encoder(layers: Iterable[str], classes: frozenset[str]) -> Iterator[str]:
    for attention in _owners(layers, r"(.*\.self_attn)\.[^.]*"):
        yield from (f"{attention}.{layer}" for layer in _TEXT if classes)


def _owners(layers: Iterable[str], pattern: str) -> list[str]:
    """The modules that `pattern` finds in the layers' names, each once, in order."""
    return list(dict.fromkeys(found[1] for layer in layers if (found := re.fullmatch(pattern, layer))))


def _classes(part: LoraPart, metadata: Mapping[str, str]) -> frozenset[str]:
    """The classes whose layers the file has numbered. Raises CheckpointError for unknown ones."""
    known = _CLASSES[part]
    if part not in metadata:
        return known
    try:
        classes = frozenset(map(str, json.loads(metadata[part])))
    except (ValueError, TypeError, RecursionError):
        classes = frozenset({metadata[part][:_LONGEST_CLASS]})
    if unknown := sorted(classes - known):
        raise CheckpointError(
            f"the LoRA numbers layers of the {part} within {', '.join(unknown)[:_LONGEST_CLASS]}, whose order is not "
            f"known: supported are {', '.join(sorted(known))}."
        )
    return classes
