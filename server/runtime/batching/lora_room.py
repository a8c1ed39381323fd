"""Whose LoRAs the pool of a model still has room for. Policy only: no device, no HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from server.requests.request import Request
from server.runtime.batching.line import Line


class LoraRoom:
    """Lets a request join only if the pool holds its LoRAs together with those of the running requests.

    Otherwise it waits, and those behind it as for rows. It waits for requests that run to end, not for ever: until it
    has joined, none with LoRAs joins at another size either, so that what is in use becomes less.
    """

    def __init__(self, ranks: int) -> None:
        """`ranks` are those of the pool."""
        self.ranks = ranks
        self._owed: Line | None = None  # the one whose next request waits for the pool

    def admits(self, newcomer: Request, line: Line, running: Sequence[Request]) -> bool:
        """Whether `newcomer`, the next of `line`, may join; `running` are all requests of the model that run."""
        if not newcomer.ranks:
            return True
        if self._owed is not line and _waits_with_loras(self._owed):
            return False
        fits = _distinct_ranks((*running, newcomer)) <= self.ranks
        self._owed = None if fits else line
        return fits


def _waits_with_loras(line: Line | None) -> bool:
    return line is not None and len(line.waiting) > 0 and line.waiting.peek().ranks > 0


def _distinct_ranks(requests: Sequence[Request]) -> int:
    """The ranks of their LoRAs, of which the pool holds each once."""
    loras = [weighted.lora for request in requests for weighted in request.params.loras]
    return sum({lora.sha256: lora.ranks for lora in loras}.values())
