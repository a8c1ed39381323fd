"""Embeddings of prompts on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from engines.backends.device import Buffer, Call, Device, Engine, Event, Stream
from engines.contract import IDS_2, LORA_POOL, PROMPT_POOLS, Port
from engines.manifest import Manifest
from engines.row_buckets import rank_buckets
from server.requests.tokenizer import Chunk, Prompt
from server.runtime.pipeline.lora_pool import PlacedLora, Ranks
from server.runtime.pipeline.row_cache import RowCache


class _Key(NamedTuple):
    """What embeddings depend on."""

    chunk: Chunk
    clip_skip: int  # how many of the text encoder's layers are left out
    loras: tuple[tuple[str, float], ...]  # those that update the text encoder: hash and weight


class _UpdatedCall(NamedTuple):
    """The text encoder with LoRAs, bound for a number of ranks."""

    call: Call
    rows: Buffer  # [1, A] i64, of the LoRA pool
    weights: Buffer  # [1, A] f32


class PromptPool:
    """A cache of the embeddings of prompt chunks on the device.

    Requests with the same chunk share a row, and rows outlive their requests until the space is needed: a negative
    prompt that most requests use is encoded once.
    """

    def __init__(  # noqa: PLR0913 - the parts, all by keyword
        self,
        manifest: Manifest,
        engine: Engine,
        device: Device,
        *,
        stream: Stream,
        rows: int,
        updated: tuple[Engine, Buffer] | None = None,
        on_lookup: Callable[[bool], None] = lambda _found: None,
    ) -> None:
        """The engines were loaded for `stream`; `on_lookup` is called for each chunk with whether it was cached.

        `updated` is the engine that applies LoRAs, and their pool.
        """
        sizes = {**manifest.dims(manifest.resolutions[0]), "C": rows, "N": 1}

        def allocate(ports: Iterable[Port]) -> dict[str, Buffer]:
            return {port.name: device.allocate(port.shape(sizes), port.dtype, purpose="prompts") for port in ports}

        self._tokens, self._layers = manifest.context.tokens, manifest.context.layers
        self.pools = allocate(port for port in manifest.inputs("denoise") if port.name in PROMPT_POOLS)  # by port
        self._inputs = allocate(manifest.inputs("encode_prompt"))
        self._dtypes = {port.name: port.dtype for port in manifest.inputs("encode_prompt")}
        self._outputs = allocate(manifest.outputs("encode_prompt"))
        buffers = self._inputs | self._outputs
        self._encode = engine.bind(buffers)
        self._updated: dict[int, _UpdatedCall] = {}  # by ranks, ascending
        if updated and manifest.lora:
            for ranks in rank_buckets(manifest.lora):
                self._updated[ranks] = _bind_updated(*updated, device, buffers, ranks)
        self._stream = stream
        self._on_lookup = on_lookup
        self._cache = RowCache[_Key](range(rows))

    def acquire(self, prompt: Prompt, *, clip_skip: int = 0, loras: Sequence[PlacedLora] = ()) -> tuple[int, ...]:
        """Return the rows of the embeddings of the prompt's chunks, which are kept until `release`.

        They are valid once the stream has done the work queued on it. It overwrites none before the last step that
        reads it is done, which is mostly long ago: so an encoding rarely waits for steps that are in flight.
        `loras` are those of its request, uploaded; prompts that none of them updates are shared with requests without.

        Raises:
            EngineError: and no row is held, as with any other exception.
        """
        ranks = Ranks.of(_updating(loras))
        held: list[_Key] = []
        with ExitStack() as undo:
            undo.callback(self._release, held)
            for key in _keys(prompt, clip_skip, loras):
                self._hold(key, ranks)
                held.append(key)
            undo.pop_all()
        return tuple(row for key in held for row in self._cache[key])

    def release(
        self,
        prompt: Prompt,
        *,
        clip_skip: int = 0,
        loras: Sequence[PlacedLora] = (),
        last_read: Event | None = None,
    ) -> None:
        """Undo one `acquire`; no step reads the rows for it after `last_read`. None: none has read them."""
        self._release(_keys(prompt, clip_skip, loras), last_read)

    def warm_up(self) -> None:
        """Encode a blank chunk, in every way, and keep nothing of it."""
        ids = (0,) * self._tokens
        blank = _Key(Chunk(ids, (1.0,) * self._tokens, ids), 0, ())
        for count in (0, *self._updated):
            self._launch(blank, Ranks((0,) * count, (0.0,) * count))

    def _hold(self, key: _Key, ranks: Ranks) -> None:
        found = key in self._cache
        self._on_lookup(found)
        if found:
            self._cache.hold(key)
        else:
            self._add(key, ranks)

    def _release(self, keys: Sequence[_Key], last_read: Event | None = None) -> None:
        for key in keys:
            self._cache.release(key, last_read)

    def _add(self, key: _Key, ranks: Ranks) -> None:
        self._launch(key, ranks)
        rows = self._cache.add(key, 1)
        with ExitStack() as undo:
            undo.callback(self._cache.discard, key)
            self._cache.await_readers(rows, self._stream)
            for name, pool in self.pools.items():
                self._stream.copy(self._outputs[PROMPT_POOLS[name]], pool, at=rows[0])
            undo.pop_all()

    def _launch(self, key: _Key, ranks: Ranks) -> None:
        chunk = key.chunk
        values = {
            "ids": [chunk.ids],
            IDS_2.name: [chunk.ids_2],
            "layer": [self._layers - key.clip_skip],
            "weights": [chunk.weights],
        }
        for name, dtype in self._dtypes.items():
            self._stream.write(self._inputs[name], np.array(values[name], dtype))
        if not ranks.rows:
            self._encode.launch()
            return
        count, bound = next((count, bound) for count, bound in self._updated.items() if count >= len(ranks.rows))
        rows, weights = ranks.padded(count)
        self._stream.write(bound.rows, rows[None])
        self._stream.write(bound.weights, weights[None])
        bound.call.launch()


def _bind_updated(
    engine: Engine, pool: Buffer, device: Device, buffers: Mapping[str, Buffer], ranks: int
) -> _UpdatedCall:
    rows = device.allocate((1, ranks), np.int64, purpose="prompts")
    weights = device.allocate((1, ranks), np.float32, purpose="prompts")
    call = engine.bind({**buffers, LORA_POOL.name: pool, "row_lora": rows, "lora_weight": weights})
    return _UpdatedCall(call, rows, weights)


def _updating(loras: Sequence[PlacedLora]) -> list[PlacedLora]:
    return [placed for placed in loras if placed.lora.updates_text_encoder]


def _keys(prompt: Prompt, clip_skip: int, loras: Sequence[PlacedLora]) -> list[_Key]:
    updates = tuple((placed.lora.sha256, placed.weight) for placed in _updating(loras))
    return [_Key(chunk, clip_skip, updates) for chunk in prompt.chunks]
