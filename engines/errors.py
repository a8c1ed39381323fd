"""The errors of engines and bundles. Their messages say what to do next."""

from __future__ import annotations


class EngineError(Exception):
    """An engine or its bundle cannot do what was asked; the message says what to do about it."""


class DeviceLost(EngineError):
    """The device computes nothing more for this process, which has to end: another one may start anew."""


class BundleError(EngineError):
    """A bundle is missing, altered, or of a format this version does not read."""


class CheckpointError(EngineError):
    """A checkpoint, or a LoRA, cannot be found or read, or is not supported."""
