"""What the tools that trained a LoRA say of it in its metadata: untrusted, so bounded and printable."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_MOST_TAGS = 20
_LONGEST_TAG = 60  # characters
_LONGEST_JSON = 4 << 20  # characters; the tags of large training sets take one million


@dataclass(frozen=True, slots=True)
class Hints:
    """What to show of a LoRA, as far as its metadata has it."""

    title: str = ""
    base_model: str = ""  # what it was trained on, in the words of the tool
    trigger_words: str = ""
    tags: tuple[str, ...] = ()  # of its training images, the most frequent first


NO_HINTS = Hints()


def read_hints(metadata: Mapping[str, str]) -> Hints:
    """Read the metadata of kohya's tools, and of the ModelSpec standard."""

    def first(*keys: str) -> str:
        return next(filter(None, (printable(metadata.get(key, "")) for key in keys)), "")

    return Hints(
        title=first("modelspec.title", "ss_output_name"),
        base_model=first("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name"),
        trigger_words=first("modelspec.trigger_phrase"),
        tags=tuple(_tags(metadata.get("ss_tag_frequency", ""))),
    )


def printable(text: str, longest: int = 200) -> str:
    """The text in one line, without what is not printed, cut to `longest` characters."""
    start = text[: 2 * longest]
    shown = "".join(letter if letter.isprintable() else " " for letter in start)
    return " ".join(shown.split())[:longest]


def _tags(text: str) -> Iterator[str]:
    """The most frequent ones of kohya's {folder: {tag: how often}}."""
    try:
        folders = json.loads(text) if len(text) <= _LONGEST_JSON else {}
        counts = Counter[str]()
        for tags in folders.values():
            for tag, count in tags.items():
                counts[printable(tag, _LONGEST_TAG)] += int(count)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return
    yield from (tag for tag, _ in counts.most_common(_MOST_TAGS) if tag)
