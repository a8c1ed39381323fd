"""The shapes that steps are padded to where calls are captured, and those that are warmed up."""

from __future__ import annotations

from collections.abc import Iterator

from engines.contract import MAX_CHUNKS
from engines.manifest import Manifest
from engines.row_buckets import CHUNK_BUCKETS, rank_buckets, row_buckets, step_buckets
from server.requests.depths import Depth
from server.requests.request import Request
from server.runtime.batching.step_times import StepTimeModel, kind_of
from server.runtime.pipeline.plan import StepShape


class StepShapes:
    """Which shapes steps of a model have on a device."""

    def __init__(self, manifest: Manifest, step_times: StepTimeModel, *, pads: bool, has_loras: bool) -> None:
        """`pads` says whether the device captures calls, `has_loras` whether it has the graphs that apply LoRAs."""
        self._rows = manifest.rows
        self._ranks = rank_buckets(manifest.lora) if manifest.lora and has_loras else ()
        self._step_times = step_times
        self._pads = pads

    def chosen(self, shape: StepShape, first: Request) -> StepShape:
        """What a step of `shape` takes, of which `first` is a request: the same for an isolated one every time."""
        if not self._pads:
            return shape
        fitting = self._fitting(shape)
        by_rows = {one.rows: one for one in fitting}
        if first.params.isolated:
            return fitting[0]
        kind = kind_of(first.params.size, shape.depth, loras=bool(shape.ranks))
        return by_rows[self._step_times.cheapest(kind, tuple(by_rows))]

    def _fitting(self, shape: StepShape) -> list[StepShape]:
        """The captured shapes of the least prompts and ranks that `shape` fits in, by rows."""
        if shape.ranks:
            chunks = 1 if shape.chunks == 1 else MAX_CHUNKS
            ranks = next(ranks for ranks in self._ranks_at(chunks) if ranks >= shape.ranks)
            counts = self._rows
        else:
            chunks = next(chunks for chunks in CHUNK_BUCKETS if chunks % shape.chunks == 0)
            ranks, counts = 0, row_buckets(self._rows, chunks=chunks)
        return [StepShape(rows, rows, chunks, shape.depth, ranks) for rows in counts if rows >= shape.rows]

    def _ranks_at(self, chunks: int) -> tuple[int, ...]:
        """The ranks per row that steps with LoRAs are padded to; with long prompts, which are rare, the most."""
        return self._ranks if chunks == 1 else self._ranks[-1:]

    def to_warm_up(self, depth: Depth) -> Iterator[StepShape]:
        """Those of a depth; where calls are captured all, the largest first."""
        if self._pads:
            yield from self._captured_with_loras(depth)
            yield from (StepShape(rows, rows, chunks, depth) for rows, chunks in step_buckets(self._rows))
        else:  # the smallest, and the largest, which takes all memory: times in between are interpolated
            extremes = sorted({self._rows[0], self._rows[-1]})
            for ranks in (0, *self._ranks[:1]):
                yield from (StepShape(max(rows // 2, 1), rows, 1, depth, ranks) for rows in extremes)

    def _captured_with_loras(self, depth: Depth) -> list[StepShape]:
        """Three shapes for each row bucket that the bundle was built for, so fewer than without LoRAs."""
        shapes = [
            StepShape(rows, rows, chunks, depth, ranks)
            for rows in self._rows
            for chunks in ((1, MAX_CHUNKS) if self._ranks else ())
            for ranks in self._ranks_at(chunks)
        ]
        return sorted(shapes, reverse=True)
