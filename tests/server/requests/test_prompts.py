"""Attention syntax: examples, and properties of any text."""

from __future__ import annotations

import math
import re
import sys
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import server.requests.prompts
from server.requests.prompts import MAX_WEIGHT, WeightedSpan, excerpt, parse, unsupported

UP, DOWN = 1.1, 1 / 1.1
Part = list[tuple[str, float]]

WEIGHTS: dict[str, Part] = {
    # Text.
    "a red cat, on a hill": [("a red cat, on a hill", 1)],
    "  spaces\n stay ": [("  spaces\n stay ", 1)],
    "ratio 16:9, {braces} | <angles>": [("ratio 16:9, {braces} | <angles>", 1)],
    "": [],
    # Brackets.
    "(cat)": [("cat", UP)],
    "[cat]": [("cat", DOWN)],
    "((cat))": [("cat", UP**2)],
    "(((cat)))": [("cat", UP**3)],
    "[[cat]]": [("cat", DOWN**2)],
    "[(cat)]": [("cat", 1)],
    "a (red) cat": [("a ", 1), ("red", UP), (" cat", 1)],
    "(a [red] cat)": [("a ", UP), ("red", 1), (" cat", UP)],
    "()[]": [],
    "a () b": [("a  b", 1)],
    # Weights.
    "(cat:1.3)": [("cat", 1.3)],
    "(cat:2)": [("cat", 2)],
    "(cat:.5)": [("cat", 0.5)],
    "(cat:1.)": [("cat", 1)],
    "(cat:+1.5)": [("cat", 1.5)],
    "(cat:-1)": [("cat", -1)],
    "(cat:0)": [("cat", 0)],
    "(cat:١.٥)": [("cat", 1.5)],
    "(cat : 1.3 )": [("cat ", 1.3)],
    "((cat:1.3))": [("cat", 1.3 * UP)],
    "((a:2) b:0.5)": [("a", 1), (" b", 0.5)],
    "[(cat:1.3)]": [("cat", 1.3 * DOWN)],
    "(time 16:9:1.2)": [("time 16:9", 1.2)],
    "(:1.3)": [],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1),
        ("house", 1.3 * UP**2),
        (" ", UP),
        ("on", 1),
        (" a ", UP),
        ("hill", 0.5 * UP),
        (", sun, ", UP),
        ("sky", UP**4),
        (".", UP),
    ],
    # Weights that are none.
    "(cat:1.2.3)": [("cat:1.2.3", UP)],
    "(cat:.)": [("cat:.", UP)],
    "(cat:+)": [("cat:+", UP)],
    "(cat:)": [("cat:", UP)],
    "(cat:nan)": [("cat:nan", UP)],
    "(cat:inf)": [("cat:inf", UP)],
    "(cat:1e999)": [("cat:1e999", UP)],
    "(cat:1.3": [("cat:1.3", UP)],
    "(cat:1.3, dog)": [("cat:1.3, dog", UP)],
    "[cat:1.3]": [("cat:1.3", DOWN)],
    # Weights beyond the bound, which holds for the product only.
    "(cat:11)": [("cat", MAX_WEIGHT)],
    "(cat:-1000)": [("cat", -MAX_WEIGHT)],
    f"(cat:{'9' * 400})": [("cat", MAX_WEIGHT)],
    f"((cat:0):{'9' * 400})": [("cat", 0)],
    "((cat:0.5):12)": [("cat", 6)],
    "((cat:12):0.5)": [("cat", 6)],
    # Brackets without partners.
    "(a cat": [("a cat", UP)],
    "[a cat": [("a cat", DOWN)],
    "a ((b) c": [("a ", 1), ("b", UP**2), (" c", UP)],
    "a cat)": [("a cat)", 1)],
    "a cat]": [("a cat]", 1)],
    "a cat:1.3)": [("a cat:1.3)", 1)],
    "(a))": [("a", UP), (")", 1)],
    "[a:1.3)": [("a:1.3)", DOWN)],
    "[a)": [("a)", DOWN)],
    "(a]": [("a]", UP)],
    # Brackets that cross.
    "(a [b) c]": [("a ", UP), ("b", 1), (" c", DOWN)],
    "[a (b] c:1.5)": [("a ", DOWN), ("b", 1.5 * DOWN), (" c", 1.5)],
    # Escapes.
    r"\(cat\)": [("(cat)", 1)],
    r"\[cat\]": [("[cat]", 1)],
    r"a\\b": [("a\\b", 1)],
    r"\\(cat)": [("\\", 1), ("cat", UP)],
    r"(smile \(happy\):1.2)": [("smile (happy)", 1.2)],
    r"(cat:1.2\)": [("cat:1.2)", UP)],
    r"a\b": [("ab", 1)],
    "cat\\": [("cat", 1)],
    # Equal neighbours become one.
    "(a)(b)": [("ab", UP)],
    "(a:1.1)(b)": [("ab", UP)],
    "a (b:1) c": [("a b c", 1)],
    r"(a\))(b)c": [("a)b", UP), ("c", 1)],
}

BREAKS: dict[str, list[Part]] = {
    "a BREAK b": [[("a", 1)], [("b", 1)]],
    "a, \n BREAK\t, b": [[("a,", 1)], [(", b", 1)]],
    "BREAK a": [[], [("a", 1)]],
    "a BREAK": [[("a", 1)], []],
    "BREAK": [[], []],
    "a BREAK BREAK b": [[("a", 1)], [], [("b", 1)]],
    "a BREAK,BREAK b": [[("a", 1)], [(",", 1)], [("b", 1)]],
    "(a) BREAK (b)": [[("a", UP)], [("b", UP)]],
    "(a BREAK b:1.5)": [[("a", 1.5)], [("b", 1.5)]],
    "(BREAK)": [[], []],
    "[(a)] b BREAK c": [[("a b", 1)], [("c", 1)]],
    "BREAKFAST, aBREAK, BREAK_, break, Break": [[("BREAKFAST, aBREAK, BREAK_, break, Break", 1)]],
}


def parts(text: str) -> list[Part]:
    return [[(span.text, span.weight) for span in spans] for spans in parse(text)]


@pytest.mark.parametrize("text", WEIGHTS)
def test_weights(text: str) -> None:
    (part,) = parts(text)
    assert [words for words, _ in part] == [words for words, _ in WEIGHTS[text]]
    assert [weight for _, weight in part] == pytest.approx([weight for _, weight in WEIGHTS[text]], rel=1e-12)


@pytest.mark.parametrize("text", BREAKS)
def test_breaks(text: str) -> None:
    assert parts(text) == BREAKS[text]


@pytest.mark.parametrize(("opening", "weight"), [("(", MAX_WEIGHT), ("[", 0.0), ("([", 1.0)])
def test_brackets_may_nest_deeply(opening: str, weight: float) -> None:
    (((_, found),),) = parts(opening * (4000 // len(opening)) + "cat")
    assert found == pytest.approx(weight, abs=1e-9)


# Text like that of people who use the syntax, and of those who try what it takes.
SCRAPS = [
    "(",
    ")",
    "[",
    "]",
    "\\",
    ":",
    ":1.3)",
    ": -2 )",
    ":1]",
    "|",
    "cat",
    ",",
    " ",
    "\n",
    "BREAK",
    "AND",
    "<lora:x:1>",
]
texts = st.one_of(st.text(), st.lists(st.sampled_from([*SCRAPS, "9" * 400]), max_size=60).map("".join))


@settings(deadline=None)
@given(texts)
@example("(" * 4000 + ":9)" * 1000)
@example("(a:9999)" * 500)
@example(("(" * 100 + "a" + ":99999999)" * 100) * 3)
def test_every_text_can_be_parsed(text: str) -> None:
    found = parse(text)
    spans = [span for part in found for span in part]
    assert found
    assert all(span.text and math.isfinite(span.weight) and abs(span.weight) <= MAX_WEIGHT for span in spans)
    assert all(a.weight != b.weight for part in found for a, b in pairwise(part))
    assert sum(len(span.text) for span in spans) <= len(text)
    assert all(isinstance(sentence, str) and len(sentence) < 200 for sentence in unsupported(text))


@settings(deadline=None)
@given(st.text(min_size=1).filter(lambda text: not re.search(r"[()\[\]\\]|BREAK", text)))
def test_text_without_syntax_is_one_span(text: str) -> None:
    assert parse(text) == [[WeightedSpan(text, 1.0)]]
    assert not any("(" in sentence for sentence in unsupported(text))


@settings(deadline=None)
@given(texts.filter(lambda text: text and "BREAK" not in text))
def test_escaped_text_is_literal(text: str) -> None:
    escaped = re.sub(r"([()\[\]\\])", r"\\\1", text)
    assert parse(escaped) == [[WeightedSpan(text, 1.0)]]
    assert not any("Prompt editing" in sentence or "Alternation" in sentence for sentence in unsupported(escaped))


PATTERNS = [
    "(",
    ")",
    "[",
    "]",
    "\\",
    ":",
    " ",
    "1",
    ":1",
    ": ",
    "(a)b",
    "(a:9)",
    "[a|b]",
    "[a:1]",
    " BREAK ",
    "<lora:",
    "<a:b>",
    "AND ",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_time_is_linear_in_the_length(pattern: str) -> None:
    """Counted in lines of Python. What those leave to regular expressions is linear by their possessive quantifiers."""
    once, fourfold = (lines_run(pattern * repeats) for repeats in (250, 1000))
    assert fourfold <= 4.1 * once + 100


def lines_run(text: str) -> int:
    """The lines of server.requests.prompts that reading `text` takes, however they are nested in loops and calls."""
    count = 0

    def follow(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return follow if frame.f_code.co_filename == server.requests.prompts.__file__ else None

    before = sys.gettrace()
    sys.settrace(follow)
    try:
        parse(text)
        unsupported(text)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    "opening", ["(", " " * 20, ":" + " " * 20, ":" + "1" * 20, "<lora:", "<a:<b>", "<" * 20, "embedding:"]
)
def test_long_text_is_parsed_in_time(opening: str) -> None:
    """A pattern that backtracks would take minutes over it."""
    text = opening * (100_000 // len(opening))
    assert sum(len(span.text) for spans in parse(text) for span in spans) <= len(text)
    assert len(unsupported(text)) <= 5


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("a [cat:dog:0.5] here", "[cat:dog:0.5]"),
        ("a [dog:12]", "[dog:12]"),
        ("a [cat::0.5]", "[cat::0.5]"),
        ("[[a|b]:c: 0.5 ]", "[[a|b]:c: 0.5 ]"),
        ("a [cow|horse] in a field", "[cow|horse]"),
        ("[(a:1.2)|b]", "[(a:1.2)|b]"),
        ("a <lora:some style:0.8> cat", "<lora:some style:0.8>"),
        ("<LYCO:style:1>", "<LYCO:style:1>"),
        ("<lora:<x>:1>", '"<lora:<x>:1>" is treated as text: LoRAs are'),
        ("<lora:a <b> c:1> d", '"<lora:a <b> c:1>"'),
        ("<lora:one\ntwo:1>", "<lora:one two:1>"),
        ("<LyCORIS:style:1:0.5>", "<LyCORIS:style:1:0.5>"),
        ("<hypernet:style:1>", "<hypernet:style:1>"),
        ("(embedding:style.pt:1.2)", '"embedding:style.pt" is treated as text: write the token of the embedding'),
        ("<embed:style>", "write the token of the embedding"),
        ("<wildcard:animals> in a <random:a,b>", '"<wildcard:animals>" is treated as text: tags of other programs'),
        ("a cat AND a dog", "AND"),
        ("a cat AND\na dog :1.2", "AND"),
    ],
)
def test_unsupported_syntax_is_warned_of(text: str, quoted: str) -> None:
    sentences = unsupported(text)
    assert any(quoted in sentence for sentence in sentences)
    assert all("treated as text" in sentence for sentence in sentences)


@pytest.mark.parametrize(
    "text",
    [
        "a (red:1.2) [cat], 16:9",
        "a | b",
        "[a, b: c]",
        "(a|b)",
        "[(a|b)]",
        r"\[a|b\]",
        r"[a:0.5\]",
        "[a|b",
        "[cat:0.5",
        "sand AND_ and BRAND",
        "<lora:unfinished",
        "<lora:>",
        "a < b > c",
        "<3:2>",
        "<cat> and <cat_1>",
        "embedding: how words become vectors",
    ],
)
def test_ordinary_text_is_not_warned_of(text: str) -> None:
    assert unsupported(text) == ()


def test_each_kind_is_warned_of_once_with_an_alternative() -> None:
    text = "[a:b:0.5] [c:1] AND [a|b] [c|d|e] AND <lora:a:1> <lyco:b:1> <hypernet:c:1>"
    assert unsupported(text) == (
        'Prompt editing such as "[a:b:0.5]" is treated as text: use one prompt for all steps.',
        'Alternation such as "[a|b]" is treated as text: use one prompt for all steps.',
        "AND is treated as text and does not combine prompts: describe everything in one prompt.",
        '"<lora:a:1>" is treated as text: LoRAs are named in the prompt, as <lora:NAME:0.8>, on a server that is '
        "started with --loras.",
        '"<hypernet:c:1>" is treated as text: hypernetworks are not supported.',
    )


def test_an_excerpt_is_one_short_line() -> None:
    assert excerpt(" a\n cat ") == "a cat"
    assert excerpt("a" * 60) == "a" * 60
    assert excerpt("a" * 61) == "a" * 59 + "…"
