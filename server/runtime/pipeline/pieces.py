"""Work in pieces, between which the device does other work."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Pieces = Generator[None, None, T]  # what comes of them is returned after the last


def at_once(pieces: Pieces[T]) -> T:
    """Do all `pieces`; returns what comes of them."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: T = end.value
            return result
