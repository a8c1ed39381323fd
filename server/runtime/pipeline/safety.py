"""Whether images are checked for unsafe content, by what, and what becomes of flagged ones."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

from server.requests.params import Image

Mode = Literal["off", "flag", "block"]
Classify = Callable[[Image], Future[bool]]  # whether an image is flagged; called by the thread that owns the device


@dataclass(frozen=True, slots=True)
class Safety:
    """One rule for all requests. Without `classify`, the bundle's own safety checker gives the verdicts."""

    mode: Mode = "off"
    classify: Classify | None = None

    @property
    def blocks(self) -> bool:
        """Whether a request with a flagged image ends without images."""
        return self.mode == "block"

    @property
    def runs_graph(self) -> bool:
        return self.mode != "off" and self.classify is None


UNCHECKED = Safety()
