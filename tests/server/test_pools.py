"""Prompts on the device: encoded once, shared while used, and never taken from under a running request."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from engines.base import Buffer, Call, EngineError
from engines.manifest import Manifest
from engines.onnxruntime import OnnxRuntimeDevice
from server.pools import PromptPool
from server.tokenizer import Prompt


class Recorder:
    """A text encoder whose embeddings are the prompt's first token, and which counts its runs."""

    def __init__(self) -> None:
        self.runs = 0
        self.broken = False

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        self._buffers = buffers
        return self

    def run(self) -> None:
        if self.broken:
            raise EngineError("broken")
        self.runs += 1
        embeddings = self._buffers["embeddings"]
        embeddings.write(np.full(embeddings.shape, self._buffers["ids"].read()[0, 0], np.float32))


@pytest.fixture
def encoder() -> Recorder:
    return Recorder()


@pytest.fixture
def pool(manifest: Manifest, encoder: Recorder) -> PromptPool:
    return PromptPool(manifest, encoder, OnnxRuntimeDevice(threads=1), rows=3)


def prompt(number: int, manifest: Manifest) -> Prompt:
    return Prompt(str(number), (number,) * manifest.context.tokens, truncated=False)


def test_a_prompt_is_encoded_once_even_after_its_request_is_gone(
    pool: PromptPool, encoder: Recorder, manifest: Manifest
) -> None:
    first = pool.acquire(prompt(1, manifest))
    assert pool.acquire(prompt(1, manifest)) == first
    for _ in range(2):
        pool.release(prompt(1, manifest))
    assert pool.acquire(prompt(1, manifest)) == first
    assert encoder.runs == 1


def test_the_least_recently_used_makes_room_and_those_in_use_never_do(
    pool: PromptPool, encoder: Recorder, manifest: Manifest
) -> None:
    rows = [pool.acquire(prompt(number, manifest)) for number in (1, 2, 3)]
    pool.release(prompt(2, manifest))
    pool.release(prompt(3, manifest))
    assert pool.acquire(prompt(4, manifest)) == rows[1]
    assert pool.acquire(prompt(5, manifest)) == rows[2]
    assert pool.context.read()[rows[0], 0, 0] == 1, "a prompt in use was overwritten"
    assert [pool.context.read()[row, 0, 0] for row in rows] == [1, 4, 5]
    assert pool.acquire(prompt(1, manifest)) == rows[0]
    assert encoder.runs == 5


def test_a_failed_encoding_leaves_the_pool_as_it_was(pool: PromptPool, encoder: Recorder, manifest: Manifest) -> None:
    for number in (1, 2, 3):
        pool.acquire(prompt(number, manifest))
        pool.release(prompt(number, manifest))
    encoder.broken = True
    with pytest.raises(EngineError):
        pool.acquire(prompt(4, manifest))
    encoder.broken = False
    assert [pool.acquire(prompt(number, manifest)) for number in (1, 2, 3)] == [2, 1, 0]
    assert encoder.runs == 3
