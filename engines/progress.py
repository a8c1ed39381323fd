"""Progress of a build: nested stages, each with a completed fraction, and notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Stage(Protocol):
    """A stage that has begun and not ended."""

    def update(self, done: float, total: float) -> None:
        """Report that `done` of `total` is finished, in any unit: bytes, steps."""


class Progress(Protocol):
    """Receives the progress of a build."""

    def stage(self, name: str) -> AbstractContextManager[Stage]:
        """Begin a stage, which ends with the context. Stages may be nested."""

    def expect(self, stages: Sequence[str]) -> None:
        """Announce the outermost stages to come, in order. Some may be skipped, and others may come."""

    def note(self, text: str) -> None:
        """Report a warning, or the reason for a choice. Notes stay visible when their stage has ended."""


class NullProgress:
    """Discards all progress."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:  # noqa: ARG002 - the protocol's name
        yield self

    def update(self, done: float, total: float) -> None: ...

    def expect(self, stages: Sequence[str]) -> None: ...

    def note(self, text: str) -> None: ...
