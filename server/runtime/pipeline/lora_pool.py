"""LoRAs on the device, as updates of rank one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from typing import NamedTuple

import numpy as np

from engines.backends.device import Device, Event, Stream
from engines.contract import LORA_POOL, Array
from engines.manifest import Manifest
from server.requests.params import Lora
from server.runtime.pipeline.row_cache import RowCache

# The row of the pool that is never written. What no LoRA updates reads it: values of another request's LoRA, of which
# zero times infinity may be made in FP16, would be a way from one request to the images of others.
ZERO_RANK = 0
_BYTES_PER_CALL = 4 * 2**20  # a millisecond of copying at most, between which the executor launches the steps of others


class PlacedLora(NamedTuple):
    """A LoRA of a request, and the rows of the pool that hold it."""

    lora: Lora
    weight: float
    rows: tuple[int, ...]


class Ranks(NamedTuple):
    """What updates a UNet row or a prompt: rows of the LoRA pool, and how strongly each applies."""

    rows: tuple[int, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, loras: Sequence[PlacedLora]) -> Ranks:
        return cls(
            tuple(chain.from_iterable(placed.rows for placed in loras)),
            tuple(chain.from_iterable(repeat(placed.weight, len(placed.rows)) for placed in loras)),
        )

    def padded(self, count: int) -> tuple[Array, Array]:
        """[count] i64 and f32; what fills up is the zero rank, with weight 0."""
        spare = count - len(self.rows)
        return np.array(self.rows + (ZERO_RANK,) * spare), np.array(self.weights + (0.0,) * spare, np.float32)


NO_RANKS = Ranks((), ())


class LoraWatch(NamedTuple):
    """What is called with the use of a pool."""

    lookup: Callable[[bool], None]  # for each LoRA of a request, with whether it was there
    used: Callable[[int], None]  # with the ranks in use, when that has changed
    resident: Callable[
        [frozenset[str]], None
    ]  # with the hashes of the LoRAs that are there, when that may have changed


UNWATCHED = LoraWatch(lambda _found: None, lambda _ranks: None, lambda _hashes: None)


class _Upload:
    """How much of a LoRA is on its way to the device."""

    def __init__(self) -> None:
        self.ranks = 0
        self.event: Event | None = None  # after the last of them


class LoraPool:
    """A cache of LoRAs on the device. A request uses rows of it; the same file is there once for all requests.

    A LoRA is written in parts, so that others' steps go on; it is read when `upload` has returned True, by what the
    stream does after that, or by other streams after an event of it.
    """

    def __init__(self, manifest: Manifest, device: Device, *, stream: Stream, watch: LoraWatch = UNWATCHED) -> None:
        """LoRAs are written on `stream`. Raises EngineError where the memory is full."""
        dims = manifest.dims(manifest.resolutions[0])
        self.buffer = device.allocate(LORA_POOL.shape(dims), LORA_POOL.dtype, purpose="LoRA pool")
        self._cache = RowCache[str](range(ZERO_RANK + 1, dims["Q"]))
        self._uploads: dict[str, _Upload] = {}  # by the file's hash, those that are not complete
        self._stream = stream
        self._watch = watch
        bytes_per_rank = dims["G"] * np.dtype(LORA_POOL.dtype).itemsize
        # Where the device works while the host goes on, callers do too; elsewhere parts would only make it take longer.
        self._ranks_per_call = max(_BYTES_PER_CALL // bytes_per_rank, 1) if device.pads else dims["Q"]

    @property
    def used(self) -> int:
        """The ranks of LoRAs that requests use."""
        return self._cache.used

    def acquire(self, lora: Lora) -> tuple[int, ...]:
        """The rows for `lora`, which are kept until `release`, and have to be uploaded. Nothing is written yet."""
        found = lora.sha256 in self._cache
        self._watch.lookup(found)
        if found:
            self._cache.hold(lora.sha256)
        else:
            self._cache.add(lora.sha256, lora.ranks)
            self._uploads[lora.sha256] = _Upload()
            self._tell_resident()  # others may have made room
        self._watch.used(self.used)
        return self._cache[lora.sha256]

    def release(self, lora: Lora, last_read: Event | None = None) -> None:
        """Undo one `acquire`. No step reads the rows for it after `last_read`; None: none has read them."""
        self._cache.release(lora.sha256, last_read)
        if lora.sha256 in self._uploads and not self._cache.is_used(lora.sha256):
            del self._uploads[lora.sha256]
            self._cache.discard(lora.sha256)
        self._watch.used(self.used)

    def upload(self, loras: Sequence[Lora]) -> bool:
        """Write the next ranks of `loras`; returns whether that were the last ones.

        It writes nothing while those before have not arrived. Several requests may ask for the same LoRA. After an
        exception, which is one request's, the next call goes on from there.

        Raises:
            EngineError
        """
        left = self._ranks_per_call
        for lora in loras:
            if upload := self._uploads.get(lora.sha256):
                left -= self._write_next(lora, upload, left)
        return not any(lora.sha256 in self._uploads for lora in loras)

    def wait(self, loras: Sequence[Lora]) -> None:
        """Block until the ranks that `upload` wrote last have arrived. Raises EngineError."""
        for lora in loras:
            if (upload := self._uploads.get(lora.sha256)) and upload.event:
                upload.event.wait()

    def _write_next(self, lora: Lora, upload: _Upload, most: int) -> int:
        """Write at most so many ranks; returns how many."""
        if upload.event and not upload.event.done():
            return most  # what waits for the device takes pinned memory
        rows = self._cache[lora.sha256][upload.ranks : upload.ranks + most]
        self._cache.await_readers(rows, self._stream)
        for row in rows:
            self._stream.write(self.buffer, lora.values[upload.ranks], at=row)
            upload.ranks += 1
        upload.event = self._stream.record()
        if upload.ranks == lora.ranks:
            del self._uploads[lora.sha256]
            self._tell_resident()
        return len(rows)

    def _tell_resident(self) -> None:
        self._watch.resident(frozenset(self._cache) - self._uploads.keys())
