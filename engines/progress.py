"""What a build tells of its progress, and to whom: stages that begin, advance and end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Stage(Protocol):
    """A piece of work under way."""

    def update(self, done: float, total: float) -> None:
        """`done` of `total` is finished, in whatever unit the stage counts: bytes, steps."""


class Progress(Protocol):
    """Who hears of it."""

    def stage(self, name: str) -> AbstractContextManager[Stage]:
        """A stage that lasts as long as the context. Stages may lie inside one another."""

    def note(self, text: str) -> None:
        """A remark that stays: a warning, or why something was chosen."""


class Silent:
    """Tells nobody."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:  # noqa: ARG002 - the protocol's name
        yield self

    def update(self, done: float, total: float) -> None: ...

    def note(self, text: str) -> None: ...
