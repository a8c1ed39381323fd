"""`Accept`, as RFC 9110, section 12.5.1 has it."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.native.negotiation import ResponseFormat, negotiate
from server.requests.errors import NotAcceptable

TYPES: dict[str, ResponseFormat] = {
    "application/json": "json",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/webp": "webp",
    "text/event-stream": "events",
}


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ([], "json"),
        ([""], "json"),
        (["", " , "], "json"),
        (["*/*"], "json"),
        (["image/*"], "png"),
        (["text/*"], "events"),
        (["image/*, image/png;q=0"], "jpeg"),
        (["image/png;q=0, image/*"], "jpeg"),
        (["image/png;q=0", "image/*;q=0.5", "*/*;q=0.1"], "jpeg"),
        (["*/*, application/json;q=0"], "png"),
        (["text/html", "image/webp;q=0.8", "image/png;q=0.7"], "webp"),
        (["text/html", "image/webp"], "webp"),
        (["image/jpeg, image/png"], "jpeg"),
        (["image/png, */*"], "png"),
        (["*/*, image/png"], "json"),
        (["image/*;q=0.9, image/png;q=0.1, application/json;q=0.5"], "jpeg"),
        (["application/json; charset=utf-8"], "json"),
        (["image/png;level=1;q=0, image/png;q=0.5"], "png"),
        (['text/html;why="a, image/png", image/webp'], "webp"),
        (["IMAGE/PNG ; Q=0.5"], "png"),
        (["text/html,application/xhtml+xml,image/avif,image/webp,image/apng,*/*;q=0.8"], "webp"),  # a browser's
    ],
)
def test_the_most_specific_range_decides_and_the_greatest_weight_wins(lines: list[str], wanted: str) -> None:
    assert negotiate(lines) == wanted


@pytest.mark.parametrize(
    "lines",
    [["text/html"], ["*/*;q=0"], ["image/png;q=two"], ["image/png;q=1.5"], ["image/*;q=0", "text/plain"], [";"]],
)
def test_nothing_that_we_have_is_not_acceptable(lines: list[str]) -> None:
    with pytest.raises(NotAcceptable, match="image/png"):
        negotiate(lines)


weights = st.integers(0, 1000).map(lambda thousandths: thousandths / 1000)
kinds = st.sampled_from([*TYPES, "*/*", "image/*", "text/*", "application/*", "text/html", "image/avif"])
tables = st.dictionaries(kinds, weights, min_size=1)


def weight_of(kind: str, table: dict[str, float]) -> float:
    """What RFC 9110 says of `kind`: the exact range, else its type's, else that of all."""
    for name in (kind, f"{kind.partition('/')[0]}/*", "*/*"):
        if name in table:
            return table[name]
    return 0.0


def ask(table: dict[str, float], cuts: set[int] = frozenset()) -> ResponseFormat | None:  # type: ignore[assignment]
    """Negotiate over header lines of the ranges, cut into lines before the given positions."""
    elements = [f"{kind};q={weight:.3f}" for kind, weight in table.items()]
    bounds = [0, *sorted(cut for cut in cuts if 0 < cut < len(elements)), len(elements)]
    try:
        return negotiate([", ".join(elements[start:end]) for start, end in pairwise(bounds)])
    except NotAcceptable:
        return None


@given(tables)
def test_it_chooses_a_format_of_the_greatest_weight(table: dict[str, float]) -> None:
    by_format = {name: weight_of(kind, table) for kind, name in TYPES.items()}
    chosen = ask(table)
    if chosen is None:
        assert max(by_format.values()) == 0
    else:
        assert by_format[chosen] == max(by_format.values()) > 0


@given(tables, st.sets(st.integers(1, 10)))
def test_several_header_lines_are_as_one(table: dict[str, float], cuts: set[int]) -> None:
    assert ask(table, cuts) == ask(table)


@given(tables, st.randoms(use_true_random=False))
def test_the_order_matters_only_among_equals(table: dict[str, float], dice: object) -> None:
    items = list(table.items())
    dice.shuffle(items)  # type: ignore[attr-defined]
    weights = {weight_of(kind, table) for kind in TYPES}
    ranges = {weight for kind, weight in table.items()}
    if len(weights) == len(TYPES) and len(ranges) == len(table):
        assert ask(dict(items)) == ask(table)


@given(st.lists(st.text('*/;,=q01.9" \\\tapplication/json', max_size=60), max_size=4))
def test_no_header_is_an_error_of_another_kind(lines: list[str]) -> None:
    with suppress(NotAcceptable):
        assert negotiate(lines) in TYPES.values()


def test_a_header_of_many_ranges_is_read_in_no_time() -> None:
    assert negotiate([",".join(["image/png;q=0.5", *["a/b;q=0.1"] * 10_000, '"' * 10_000])]) == "png"
