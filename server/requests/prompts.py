"""AUTOMATIC1111's attention syntax: a prompt's text to weighted spans, in time linear in its length.

`(text)` weighs 1.1 times as much, `[text]` 1.1 times less, `(text:1.3)` 1.3 times as much, and nesting multiplies. A
backslash makes a bracket, or a backslash, an ordinary character. A bracket that is never closed reaches to the end, one
that was never opened is text. `BREAK` ends a chunk.

Three things differ from AUTOMATIC1111. Weights are held within ±10, where pictures have long fallen apart. `BREAK`
works inside brackets too, where AUTOMATIC1111 reads it as a word. A weight that is no number, as in `(a:1.2.3)`, is
text instead of an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

HEAVIEST = 10.0  # the largest weight, of either sign
_STRONGER = 1.1  # what a pair of round brackets multiplies by, and a pair of square ones divides by
_HUGE = 1e150  # holds a product that deep nesting drives up; the product of two such is still finite
_EXCERPT = 60  # characters

# Possessive quantifiers (++, *+) never give back what they took, so no text is scanned more than a few times.
_NUMBER = r"[+-]?(?:\d++\.?\d*+|\.\d++)"
_MARKS = re.compile(rf"\\(?P<escaped>[()\[\]\\]?)|[()\[\]]|:\s*+(?P<weight>{_NUMBER})\s*+\)")
_BREAK = re.compile(r"(?:(?<!\s)\s++)?\bBREAK\b\s*+")

_SCHEDULES = re.compile(rf"\\.|[()\[|]|(?P<step>:\s*+{_NUMBER}\s*+)?\]", re.DOTALL)
_AND = re.compile(r"\bAND\b")
_LORA = re.compile(r"<(?:lora|lyco):[^<>]*+>", re.IGNORECASE)
_HYPERNET = re.compile(r"<hypernet:[^<>]*+>", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Span:
    """Text that weighs the same throughout. Neighbours differ in weight."""

    text: str
    weight: float  # finite, within ±HEAVIEST


def parse(text: str) -> list[list[Span]]:
    """The parts of `text` between its BREAKs, at least one, of which any may be empty.

    Text without syntax comes back as it is: one part of one span of weight 1.
    """
    parts: list[list[tuple[str, float]]] = [[]]
    for piece, weight in _weigh(text):
        first, *others = _BREAK.split(piece)
        parts[-1].append((first, weight))
        parts.extend([(words, weight)] for words in others)
    return [_merge(part) for part in parts]


def _weigh(text: str) -> Iterator[tuple[str, float]]:
    """`text` in pieces, without its brackets and backslashes."""
    marks = list(_MARKS.finditer(text))
    weights = _explicit_weights(marks)
    rounds, squares = [1.0], 0  # the weight inside each open round bracket; how many square ones are open
    weight, end = 1.0, 0
    for mark in marks:
        if end < mark.start():
            yield text[end : mark.start()], weight
        end = mark.end()
        if (escaped := mark["escaped"]) is not None:  # "" after a backslash that escapes nothing: it is swallowed
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
        weight = _within(HEAVIEST, rounds[-1] * _STRONGER**-squares)  # brackets of one kind need not nest in the other
    yield text[end:], weight


def _explicit_weights(marks: Iterable[re.Match[str]]) -> dict[int, float]:
    """What each round bracket that ends in `:number)` multiplies by, under the position where it opens."""
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


def _merge(pieces: Iterable[tuple[str, float]]) -> list[Span]:
    written = [piece for piece in pieces if piece[0]]
    return [Span("".join(words for words, _ in run), weight) for weight, run in groupby(written, key=itemgetter(1))]


def unsupported(text: str) -> tuple[str, ...]:
    """What AUTOMATIC1111 would act upon in `text`, and `parse` takes for words: a sentence for each kind, which says
    what to do instead."""
    sentences = _unsupported_schedules(text)
    if _AND.search(text):
        sentences.append("AND is read as text, it does not combine prompts: describe everything in one prompt.")
    if lora := _LORA.search(text):
        sentences.append(f'"{excerpt(lora[0])}" is read as text: LoRAs are fused by build_engines.py --lora.')
    if hypernet := _HYPERNET.search(text):
        sentences.append(f'"{excerpt(hypernet[0])}" is read as text: leave it out, there are no hypernetworks here.')
    return tuple(sentences)


def _unsupported_schedules(text: str) -> list[str]:
    """Sentences about `[from:to:0.5]` and `[a|b]`, which name the first of each."""
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
        sentences.append(f'Prompt editing such as "{editing}" is read as text: write one prompt for all steps.')
    if alternation:
        sentences.append(f'Alternation such as "{alternation}" is read as text: write one prompt for all steps.')
    return sentences


def excerpt(text: str) -> str:
    """The beginning of `text` on one line, to quote it by."""
    line = " ".join(text.split())
    return line if len(line) <= _EXCERPT else line[: _EXCERPT - 1].rstrip() + "…"
