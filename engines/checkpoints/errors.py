"""The error of this folder, below every other module of it."""

from __future__ import annotations

from engines.errors import EngineError


class CheckpointError(EngineError):
    """The checkpoint cannot be found or read, or is not supported."""
