"""Content negotiation: which response format `Accept` asks for (RFC 9110, section 12.5.1)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from server.requests.errors import NotAcceptable

ResponseFormat = Literal["json", "events", "png", "jpeg", "webp"]
_TYPES: dict[str, ResponseFormat] = {  # in the order in which a range such as image/* prefers them
    "application/json": "json",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/webp": "webp",
    "text/event-stream": "events",
}
FORMATS: tuple[ResponseFormat, ...] = tuple(_TYPES.values())
_KNOWN = {"*/*", "application/*", "image/*", "text/*", *_TYPES}
_WEIGHT = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?")
_ELEMENT = re.compile(r'(?:[^,"]|"(?:\\.|[^"\\])*"?)+')  # up to a comma outside quotes


class _Range(NamedTuple):
    """A media range with its weight and its place in the header."""

    kind: str
    has_parameters: bool
    weight: float
    place: int


def negotiate(lines: Sequence[str], offered: Collection[ResponseFormat] = FORMATS) -> ResponseFormat:
    """The format with the greatest weight; among equals the one whose range comes first.

    Only those `offered` count. `lines` are the values of all `Accept` headers; anything is acceptable where they say
    nothing. The most specific range that matches a format decides its weight. Parameters other than q are ignored,
    since no format has any.

    Raises:
        NotAcceptable: no format has a weight above 0.
    """
    ranges = list(_ranges(lines)) or [_Range("*/*", has_parameters=False, weight=1, place=0)]
    ranges = [one for one in ranges if one.kind in _KNOWN]
    best: tuple[float, int] = (0, 0)
    chosen: ResponseFormat | None = None
    types = {kind: one for kind, one in _TYPES.items() if one in offered}
    for kind, response_format in types.items():
        rule = _rule(kind, ranges)
        if rule and rule.weight > 0 and (rule.weight, -rule.place) > best:
            best, chosen = (rule.weight, -rule.place), response_format
    if chosen is None:
        raise NotAcceptable(f"Accept one of {', '.join(types)}.")
    return chosen


def _rule(kind: str, ranges: Iterable[_Range]) -> _Range | None:
    """The range that decides about `kind`: the most specific, and of several such the one with the greatest weight."""
    specificity = {kind: 2, f"{kind.partition('/')[0]}/*": 1, "*/*": 0}
    matching = [one for one in ranges if one.kind in specificity]
    return max(
        matching,
        key=lambda one: (specificity[one.kind], not one.has_parameters, one.weight, -one.place),
        default=None,
    )


def _ranges(lines: Iterable[str]) -> Iterator[_Range]:
    elements = (element for line in lines for element in _ELEMENT.findall(line) if element.strip())
    for place, element in enumerate(elements):
        kind, *parameters = (piece.strip().lower() for piece in element.split(";"))
        weights = [piece[2:] for piece in parameters if piece.startswith("q=")]
        weight = float(weights[0]) if weights and _WEIGHT.fullmatch(weights[0]) else float(not weights)
        own = [piece for piece in parameters if piece and not piece.startswith("q=")]
        yield _Range(kind, bool(own), weight, place)
