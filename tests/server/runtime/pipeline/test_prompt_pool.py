"""Prompts on the device: encoded once, shared while used, and never taken from under a running request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from engines.backends.device import Buffer, Call, Device, Stream
from engines.backends.onnxruntime import OnnxRuntimeDevice
from engines.errors import EngineError
from engines.manifest import Manifest
from server.requests.tokenizer import Chunk, Prompt
from server.runtime.pipeline.prompt_pool import PromptPool


class Recorder:
    """A text encoder whose embeddings are the prompt's first token, and which counts its runs."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.runs = 0
        self.broken = False
        self.layers: list[int] = []
        self.found: list[bool] = []

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        self._buffers = buffers
        return self

    def launch(self) -> None:
        if self.broken:
            raise EngineError("broken")
        self.runs += 1
        ids, layer = (self._stream.read(self._buffers[name]).result() for name in ("ids", "layer"))
        embeddings = self._buffers["embeddings"]
        self._stream.write(embeddings, np.full(embeddings.shape, ids[0, 0], np.float32))
        self.layers.append(int(layer[0]))


@pytest.fixture
def device() -> Device:
    return OnnxRuntimeDevice(threads=1)


@pytest.fixture
def stream(device: Device) -> Stream:
    return device.stream("encode")


@pytest.fixture
def encoder(stream: Stream) -> Recorder:
    return Recorder(stream)


@pytest.fixture
def pool(manifest: Manifest, encoder: Recorder, device: Device, stream: Stream) -> PromptPool:
    return PromptPool(manifest, encoder, device, stream=stream, rows=3, on_lookup=encoder.found.append)


def prompt(number: int, manifest: Manifest, *, weight: float = 1.0) -> Prompt:
    return long_prompt(manifest, number, weight=weight)


def long_prompt(manifest: Manifest, *numbers: int, weight: float = 1.0) -> Prompt:
    """A chunk for each number."""
    tokens = manifest.context.tokens
    return Prompt(str(numbers), tuple(Chunk((number,) * tokens, (weight,) * tokens) for number in numbers))


def test_a_prompt_is_encoded_once_even_after_its_request_is_gone(
    pool: PromptPool, encoder: Recorder, manifest: Manifest
) -> None:
    first = pool.acquire(prompt(1, manifest))
    assert pool.acquire(prompt(1, manifest)) == first
    for _ in range(2):
        pool.release(prompt(1, manifest))
    assert pool.acquire(prompt(1, manifest)) == first
    assert encoder.runs == 1
    assert encoder.found == [False, True, True]


def test_the_least_recently_used_makes_room_and_those_in_use_never_do(
    pool: PromptPool, encoder: Recorder, manifest: Manifest, stream: Stream
) -> None:
    rows = [pool.acquire(prompt(number, manifest)) for number in (1, 2, 3)]
    pool.release(prompt(2, manifest))
    pool.release(prompt(3, manifest))
    assert pool.acquire(prompt(4, manifest)) == rows[1]
    assert pool.acquire(prompt(5, manifest)) == rows[2]
    context = stream.read(pool.pools["context"]).result()
    assert context[rows[0][0], 0, 0] == 1, "a prompt in use was overwritten"
    assert [context[row, 0, 0] for (row,) in rows] == [1, 4, 5]
    assert pool.acquire(prompt(1, manifest)) == rows[0]
    assert encoder.runs == 5


class PairRecorder(Recorder):
    """Two text encoders, with a pooled embedding that is the second one's first token."""

    def launch(self) -> None:
        super().launch()
        ids, pooled = self._buffers["ids_2"], self._buffers["text_embeds"]
        first = self._stream.read(ids).result()[0, 0]
        self._stream.write(pooled, np.full(pooled.shape, first, np.float32))


def test_every_pool_of_prompts_has_a_chunk_in_the_same_row(xl_bundle: Path, device: Device, stream: Stream) -> None:
    manifest = Manifest.read(xl_bundle)
    pool = PromptPool(manifest, PairRecorder(stream), device, stream=stream, rows=3)
    tokens = manifest.context.tokens
    chunks = [Chunk((number,) * tokens, (1.0,) * tokens, (10 * number,) * tokens) for number in (1, 2)]
    (first, second) = pool.acquire(Prompt("", tuple(chunks)))
    assert pool.pools.keys() == {"context", "text_embeds"}
    context, pooled = (stream.read(pool.pools[name]).result() for name in ("context", "text_embeds"))
    assert [context[row, 0, 0] for row in (first, second)] == [1, 2]
    assert [pooled[row, 0] for row in (first, second)] == [10, 20]


def test_a_failed_encoding_leaves_the_pool_as_it_was(pool: PromptPool, encoder: Recorder, manifest: Manifest) -> None:
    for number in (1, 2, 3):
        pool.acquire(prompt(number, manifest))
        pool.release(prompt(number, manifest))
    encoder.broken = True
    with pytest.raises(EngineError):
        pool.acquire(prompt(4, manifest))
    encoder.broken = False
    assert [pool.acquire(prompt(number, manifest)) for number in (1, 2, 3)] == [(2,), (1,), (0,)]
    assert encoder.runs == 3


def test_a_chunk_is_shared_among_prompts_and_within_one(
    pool: PromptPool, encoder: Recorder, manifest: Manifest
) -> None:
    first = pool.acquire(long_prompt(manifest, 1, 2, 1))
    assert first == (2, 1, 2)
    assert pool.acquire(long_prompt(manifest, 2)) == (1,)
    assert encoder.runs == 2
    pool.release(long_prompt(manifest, 1, 2, 1))
    assert pool.acquire(long_prompt(manifest, 3, 4)) == (0, 2), "the second chunk was in use, the first no longer"


def test_weights_and_skipped_layers_make_another_embedding(
    pool: PromptPool, encoder: Recorder, manifest: Manifest
) -> None:
    rows = {
        pool.acquire(prompt(1, manifest)),
        pool.acquire(prompt(1, manifest, weight=1.1)),
        pool.acquire(prompt(1, manifest), clip_skip=1),
    }
    assert len(rows) == 3
    assert encoder.layers == [2, 2, 1]


def test_a_prompt_whose_last_chunk_fails_holds_none_of_them(
    pool: PromptPool, encoder: Recorder, manifest: Manifest
) -> None:
    pool.acquire(prompt(1, manifest))
    pool.release(prompt(1, manifest))
    encoder.broken = True
    with pytest.raises(EngineError):
        pool.acquire(long_prompt(manifest, 1, 2))
    encoder.broken = False
    assert len({*pool.acquire(long_prompt(manifest, 2, 3, 4))}) == 3, "the chunk in use would have left no room"
