"""What the stub recorded of a run, and what of it must not be."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

# None of them copies from the GPU, which `Report.result["copies"]` shows, so what they compute is no activation.
_OF_SHAPES = {"Add", "Concat", "Div", "Gather", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze"}


class Entry(NamedTuple):
    """One call of the stub."""

    what: str
    name: str
    number: int
    capture: int  # the number of the capture that it fell into; 0: none


@dataclass(frozen=True)
class Report:
    """The calls of a run in their order, and what the worker wrote."""

    result: dict[str, Any]
    entries: tuple[Entry, ...]

    @classmethod
    def read(cls, record: Path, result: Path) -> Report:
        lines = record.read_text().splitlines()
        return cls(json.loads(result.read_text()), tuple(Entry(**json.loads(line)) for line in lines))

    def between(self, start: str, end: str = "") -> tuple[Entry, ...]:
        """The calls between two marks, or from a mark to the next."""
        marks = [(at, entry.name) for at, entry in enumerate(self.entries) if entry.what == "mark"]
        first = next(at for at, name in marks if name == start)
        last = next(at for at, name in marks if at > first and (not end or name == end))
        return self.entries[first + 1 : last]

    @cached_property
    def captured(self) -> dict[int, Counter[str]]:
        """How many calls of each kind every complete graph holds, by its number."""
        complete = [entry.number for entry in self.entries if (entry.what, entry.name) == ("end", "complete")]
        return {number: Counter(e.what for e in self.entries if e.capture == number) for number in complete}

    @property
    def kernels(self) -> int:
        """Kernels and fills of memory in the largest graph."""
        return max(found["kernel"] for found in self.captured.values())

    @property
    def arena(self) -> int:
        """Bytes of device memory that the launches of a graph made ONNX Runtime allocate."""
        launches = self.between(next(e.name for e in self.entries if e.name.startswith("warm up")), "replay")
        return sum(entry.number for entry in launches if (entry.what, entry.name) == ("allocate", "device"))

    def nodes_on_cpu(self) -> set[str]:
        """The operators that are not on the GPU, but those that ONNX Runtime leaves on the CPU to compute shapes."""
        elsewhere = {
            name for place, names in self.result["nodes"].items() for name in names if place != "CUDAExecutionProvider"
        }
        return elsewhere - _OF_SHAPES

    def faults(self) -> list[str]:
        """What CUDA refuses in a capture, or what a captured graph would do wrong later on."""
        return sorted(set(self._faults()))

    def _faults(self) -> Iterator[str]:
        for entry in self.entries:
            if entry.capture and entry.what in ("allocate", "free", "sync", "query", "host function"):
                yield f"{entry.what} of {entry.name} in a capture"
            elif entry.capture and (entry.what, entry.name) == ("upload", "pageable"):
                yield "a graph copies from pageable memory"
            elif (entry.what, entry.name) == ("replay", "stale"):
                yield "a graph copies from memory that changed"
            elif (entry.what, entry.name) == ("end", "invalidated"):
                yield "a capture was invalidated"

    def replayed(self) -> Counter[str]:
        """What the launches did after all had been captured."""
        return Counter(entry.what for entry in self.between("replay"))
