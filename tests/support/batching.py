"""Requests and batchers for tests of policy: no device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache as cached
from types import MappingProxyType

import numpy as np

from engines.manifest import NoiseSchedule, Size
from engines.schedulers import Scheduler, Table, table
from server.requests.context import Caller, Priority, RequestContext
from server.requests.depths import Cache
from server.requests.params import GenerationParams, Lora, WeightedLora
from server.requests.request import Request
from server.requests.tokenizer import Chunk, Prompt
from server.runtime.batching.batcher import Batch, Batcher
from server.runtime.batching.step_times import Kind, StepTimeModel

SMALL, LARGE = Size(width=64, height=64), Size(width=128, height=64)
Seconds = Callable[[Kind, int], float]


def request(
    name: str,
    *,
    images: int = 1,
    guided: bool = True,
    size: Size = SMALL,
    steps: int = 3,
    isolated: bool = False,
    cache: Cache = "off",
    caller: str = "",
    priority: Priority = "interactive",
    chunks: int = 1,
    model: str = "",
    loras: Mapping[str, int] = MappingProxyType({}),
) -> Request:
    """`loras` are the ranks of each, by name."""
    scale, seeds = 7.5 if guided else 1.0, tuple(range(images))
    params = GenerationParams(
        _prompt(chunks),
        _prompt(chunks),
        size,
        Scheduler("euler"),
        steps,
        scale,
        seeds,
        isolated=isolated,
        cache=cache,
        model=model,
        loras=tuple(WeightedLora(_lora(lora, ranks), 1.0) for lora, ranks in loras.items()),
    )
    context = RequestContext(Caller(caller))
    return Request(params, _table(steps), (), name, context, priority)


def _lora(name: str, ranks: int) -> Lora:
    return Lora(name, name, np.zeros((ranks, 1), np.float16), updates_unet=True, updates_text_encoder=False)


def _prompt(chunks: int) -> Prompt:
    return Prompt("", (Chunk((), ()),) * chunks)


class KnownTimes(StepTimeModel):
    """Step times that a test gives."""

    def __init__(self, seconds: Seconds) -> None:
        super().__init__(max_rows=8)
        self._known = seconds

    def seconds(self, kind: Kind, rows: int) -> float:
        return self._known(kind, rows)


def batcher(
    *requests: Request,
    max_rows: int = 8,
    max_waiting: int = 100,
    lora_ranks: int = 0,
    seconds: Seconds = lambda _kind, _rows: 0.0,
) -> Batcher:
    made = Batcher(max_waiting=max_waiting)
    made.add("", max_rows=max_rows, lora_ranks=lora_ranks, step_times=KnownTimes(seconds))
    for item in requests:
        made.submit(item)
    return made


@cached
def _table(steps: int) -> Table:
    return table(Scheduler("euler"), steps, NoiseSchedule())


def step(policy: Batcher) -> Batch | None:
    batch = policy.next_batch()
    for item in batch.requests if batch else ():
        item.advance()
        if item.denoised:
            policy.leave(item)
    return batch
