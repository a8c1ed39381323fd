"""The version of latentd. It is read once: later there may be no descriptor left for its file."""

from __future__ import annotations

from importlib.metadata import version

VERSION = version("latentd")
