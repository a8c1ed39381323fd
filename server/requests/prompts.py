"""Parser of AUTOMATIC1111's attention syntax: from prompt text to weighted spans, in linear time.

`(text)` multiplies the weight by 1.1, `[text]` divides it by 1.1, `(text:1.3)` multiplies it by 1.3, and nesting
multiplies. A backslash escapes a bracket or a backslash. An unclosed bracket extends to the end of the prompt; a
closing bracket without an opening one is text. `BREAK` ends a chunk.

Differences from AUTOMATIC1111: weights are clamped to ±10, far beyond useful values; `BREAK` also works inside
brackets, where AUTOMATIC1111 reads it as a word; a weight that is not a number, as in `(a:1.2.3)`, is text instead of
an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

MAX_WEIGHT = 10.0  # the largest absolute weight
_STRONGER = 1.1  # factor of round brackets; square brackets divide by it
_HUGE = 1e150  # bound on the product of nested weights; the product of two such values is finite
_EXCERPT = 60  # characters

# Possessive quantifiers (++, *+) do not backtrack, which keeps matching linear.
_NUMBER = r"[+-]?(?:\d++\.?\d*+|\.\d++)"
_MARKS = re.compile(rf"\\(?P<escaped>[()\[\]\\]?)|[()\[\]]|:\s*+(?P<weight>{_NUMBER})\s*+\)")
_BREAK = re.compile(r"(?:(?<!\s)\s++)?\bBREAK\b\s*+")

_SCHEDULES = re.compile(rf"\\.|[()\[|]|(?P<step>:\s*+{_NUMBER}\s*+)?\]", re.DOTALL)
_AND = re.compile(r"\bAND\b")
# What AUTOMATIC1111 and its relatives take out of a prompt, <lora:name:1>, and ComfyUI's names of embeddings.
_TAG = re.compile(
    r"<(?P<kind>[a-z]\w{0,30}+):(?:[^<>]++|<[^<>]*+>){1,9}+>|\bembedding:[^\s,:()<>]{1,99}+", re.IGNORECASE
)
_LORAS = "LoRAs are named in the prompt, as <lora:NAME:0.8>, on a server that is started with --loras"
_EMBEDDINGS = "write the token of the embedding, as the bundle has it"
_ADVICE = {
    "lora": _LORAS,
    "lyco": _LORAS,
    "lycoris": _LORAS,
    "locon": _LORAS,
    "loha": _LORAS,
    "hypernet": "hypernetworks are not supported",
    "embedding": _EMBEDDINGS,
    "embed": _EMBEDDINGS,
    "ti": _EMBEDDINGS,
}
_OTHER_TAG = "tags of other programs are not followed"


@dataclass(frozen=True, slots=True)
class WeightedSpan:
    """Text of one weight. Adjacent spans have different weights."""

    text: str
    weight: float  # finite, within ±MAX_WEIGHT


def parse(text: str) -> list[list[WeightedSpan]]:
    """Split `text` at each BREAK into parts of weighted spans; at least one part, each possibly empty.

    Text without syntax gives one part with one span of weight 1.
    """
    parts: list[list[tuple[str, float]]] = [[]]
    for piece, weight in _weigh(text):
        first, *others = _BREAK.split(piece)
        parts[-1].append((first, weight))
        parts.extend([(words, weight)] for words in others)
    return [_merge(part) for part in parts]


def _weigh(text: str) -> Iterator[tuple[str, float]]:
    """Yield the pieces of `text` and their weights, without brackets and backslashes."""
    marks = list(_MARKS.finditer(text))
    weights = _explicit_weights(marks)
    rounds, squares = [1.0], 0  # the weight inside each open round bracket; how many square ones are open
    weight, end = 1.0, 0
    for mark in marks:
        if end < mark.start():
            yield text[end : mark.start()], weight
        end = mark.end()
        if (escaped := mark["escaped"]) is not None:  # "" after a backslash that escapes nothing: it is dropped
            yield escaped, weight
        elif mark[0] == "(":
            rounds.append(_within(_HUGE, rounds[-1] * weights.get(mark.start(), _STRONGER)))
        elif mark[0] == "[":
            squares += 1
        elif mark[0] == "]" and squares:
            squares -= 1
        elif mark[0] != "]" and len(rounds) > 1:
            rounds.pop()
        else:
            yield mark[0], weight
        weight = _within(
            MAX_WEIGHT, rounds[-1] * _STRONGER**-squares
        )  # round and square brackets need not nest properly
    yield text[end:], weight


def _explicit_weights(marks: Iterable[re.Match[str]]) -> dict[int, float]:
    """The weights of brackets that end in `:number)`, by the position of the opening bracket."""
    opened: list[int] = []
    weights = {}
    for mark in marks:
        if mark[0] == "(":
            opened.append(mark.start())
        elif opened and (mark["weight"] or mark[0] == ")"):
            start = opened.pop()
            if number := mark["weight"]:
                weights[start] = _within(_HUGE, float(number))
    return weights


def _within(bound: float, value: float) -> float:
    return max(-bound, min(bound, value))


def _merge(pieces: Iterable[tuple[str, float]]) -> list[WeightedSpan]:
    written = [piece for piece in pieces if piece[0]]
    return [
        WeightedSpan("".join(words for words, _ in run), weight) for weight, run in groupby(written, key=itemgetter(1))
    ]


def unsupported(text: str) -> tuple[str, ...]:
    """Warnings about AUTOMATIC1111 syntax in `text` that `parse` treats as text, each with an alternative."""
    sentences = _unsupported_schedules(text)
    if _AND.search(text):
        sentences.append("AND is treated as text and does not combine prompts: describe everything in one prompt.")
    sentences.extend(_unsupported_tags(text))
    return tuple(sentences)


def _unsupported_tags(text: str) -> list[str]:
    """Warnings about tags, one for each piece of advice, quoting the first occurrence."""
    first: dict[str, str] = {}
    for tag in _TAG.finditer(text):
        kind = (tag["kind"] or "embedding").lower()
        first.setdefault(_ADVICE.get(kind, _OTHER_TAG), excerpt(tag[0]))
    return [f'"{tag}" is treated as text: {advice}.' for advice, tag in first.items()]


def _unsupported_schedules(text: str) -> list[str]:
    """Warnings about prompt editing `[from:to:0.5]` and alternation `[a|b]`, each quoting the first occurrence."""
    editing = alternation = ""
    opened: list[tuple[str, int]] = []  # brackets and where they open; a square one becomes "|" when it holds a bar
    for mark in _SCHEDULES.finditer(text):
        inside, start = opened[-1] if opened else ("", 0)
        if mark[0] in {"(", "["}:
            opened.append((mark[0], mark.start()))
        elif mark[0] == "|" and inside == "[":
            opened[-1] = ("|", start)
        elif mark[0] == ")" and inside == "(":
            opened.pop()
        elif mark[0][-1] == "]" and mark[0][0] != "\\" and inside in {"[", "|"}:
            opened.pop()
            if mark["step"] and not editing:
                editing = excerpt(text[start : mark.end()])
            elif inside == "|" and not alternation:
                alternation = excerpt(text[start : mark.end()])
    sentences = []
    if editing:
        sentences.append(f'Prompt editing such as "{editing}" is treated as text: use one prompt for all steps.')
    if alternation:
        sentences.append(f'Alternation such as "{alternation}" is treated as text: use one prompt for all steps.')
    return sentences


def excerpt(text: str) -> str:
    """The beginning of `text` on one line, for quotation in messages."""
    line = " ".join(text.split())
    return line if len(line) <= _EXCERPT else line[: _EXCERPT - 1].rstrip() + "…"
