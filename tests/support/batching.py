"""Requests and batchers for tests of policy: no device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as cached

from engines.manifest import NoiseSchedule, Size
from engines.schedulers import Scheduler, Table, table
from server.requests.context import Caller, Priority, RequestContext
from server.requests.request import Cache, GenerationParams, Request
from server.requests.tokenizer import Chunk, Prompt
from server.runtime.batcher import Batch, Batcher
from server.runtime.step_times import Kind

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
) -> Request:
    scale, seeds = 7.5 if guided else 1.0, tuple(range(images))
    params = GenerationParams(
        _prompt(chunks), _prompt(chunks), size, Scheduler("euler"), steps, scale, seeds, isolated=isolated, cache=cache
    )
    context = RequestContext(Caller(caller))
    return Request(params, _table(steps), (), name, context, priority)


def _prompt(chunks: int) -> Prompt:
    return Prompt("", (Chunk((), ()),) * chunks)


def batcher(
    *requests: Request, max_rows: int = 8, max_waiting: int = 100, seconds: Seconds = lambda _kind, _rows: 0.0
) -> Batcher:
    made = Batcher(max_rows=max_rows, max_waiting=max_waiting, seconds=seconds)
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
