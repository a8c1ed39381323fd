"""Embeddings of prompts on the device."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

from engines.backends.device import Device, Engine, Event, Stream
from engines.manifest import Manifest
from server.requests.tokenizer import Chunk, Prompt

_Key = tuple[Chunk, int]  # and how many of the text encoder's layers are left out


class PromptPool:
    """A cache of the embeddings of prompt chunks on the device.

    Requests with the same chunk share a row, and rows outlive their requests until the space is needed: a negative
    prompt that most requests use is encoded once.
    """

    def __init__(
        self,
        manifest: Manifest,
        engine: Engine,
        device: Device,
        *,
        stream: Stream,
        rows: int,
        on_lookup: Callable[[bool], None] = lambda _found: None,
    ) -> None:
        """`engine` was loaded for `stream`; `on_lookup` is called for each chunk with whether it was cached."""
        context = manifest.context
        self.context = device.allocate((rows, context.tokens, context.width), np.float32, purpose="prompts")
        self._layers = context.layers
        self._ids = device.allocate((1, context.tokens), np.int64, purpose="prompts")
        self._layer = device.allocate((1,), np.int64, purpose="prompts")
        self._weights = device.allocate((1, context.tokens), np.float32, purpose="prompts")
        self._embeddings = device.allocate((1, context.tokens, context.width), np.float32, purpose="prompts")
        buffers = {"ids": self._ids, "layer": self._layer, "weights": self._weights, "embeddings": self._embeddings}
        self._encode = engine.bind(buffers)
        self._stream = stream
        self._on_lookup = on_lookup
        self._free = list(range(rows))
        self._rows: OrderedDict[_Key, int] = OrderedDict()  # least recently used first
        self._users: Counter[_Key] = Counter()
        self._last_read: dict[_Key, Event] = {}  # by steps, of those that nobody uses

    def acquire(self, prompt: Prompt, *, clip_skip: int = 0) -> tuple[int, ...]:
        """Return the rows of the embeddings of the prompt's chunks, which are kept until `release`.

        They are valid once the stream has done the work queued on it. It overwrites none before the last step that
        reads it is done, which is mostly long ago: so an encoding rarely waits for steps that are in flight.

        Raises:
            EngineError: and no row is held, as with any other exception.
        """
        held: list[_Key] = []
        with ExitStack() as undo:
            undo.callback(self._release, held)
            for chunk in prompt.chunks:
                self._hold((chunk, clip_skip))
                held.append((chunk, clip_skip))
            undo.pop_all()
        return tuple(self._rows[key] for key in held)

    def release(self, prompt: Prompt, *, clip_skip: int = 0, last_read: Event | None = None) -> None:
        """Release the rows of a prompt, which no step reads after `last_read`; None: none has read them."""
        self._release([(chunk, clip_skip) for chunk in prompt.chunks], last_read)

    def warm_up(self) -> None:
        """Encode a blank chunk, and keep nothing of it."""
        tokens = self._ids.shape[1]
        self._launch(Chunk((0,) * tokens, (1.0,) * tokens), 0)

    def _hold(self, key: _Key) -> None:
        self._on_lookup(key in self._rows)
        if key not in self._rows:
            self._rows[key] = self._encoded(key)
        self._rows.move_to_end(key)
        self._users[key] += 1

    def _release(self, keys: list[_Key], last_read: Event | None = None) -> None:
        for key in keys:
            self._users[key] -= 1
            if last_read:
                self._last_read[key] = last_read
            if not self._users[key]:
                del self._users[key]

    def _encoded(self, key: _Key) -> int:
        self._launch(*key)
        row, last_read = (self._free.pop(), None) if self._free else self._evict()
        with ExitStack() as undo:
            undo.callback(self._free.append, row)
            if last_read:
                self._stream.follow(last_read)
            self._stream.copy(self._embeddings, self.context, at=row)
            undo.pop_all()
        return row

    def _launch(self, chunk: Chunk, clip_skip: int) -> None:
        self._stream.write(self._ids, np.array([chunk.ids]))
        self._stream.write(self._layer, np.array([self._layers - clip_skip]))
        self._stream.write(self._weights, np.array([chunk.weights], np.float32))
        self._encode.launch()

    def _evict(self) -> tuple[int, Event | None]:
        """A row that nobody uses, and the last step that reads it."""
        unused = next(key for key in self._rows if key not in self._users)
        return self._rows.pop(unused), self._last_read.pop(unused, None)
