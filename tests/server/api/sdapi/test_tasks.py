"""Calls in progress."""

from __future__ import annotations

import asyncio
import time

import pytest

from engines.manifest import NoiseSchedule, Size
from engines.schedulers import Scheduler, table
from server.api.event_queue import EventQueue
from server.api.sdapi.tasks import Task, Tasks
from server.api.service import Accepted
from server.requests.context import Caller
from server.requests.errors import Cancelled, NotReady, QueueFull, ServerError
from server.requests.params import GenerationParams
from server.requests.request import Completed, Failed, Request, Started, Stepped
from server.requests.tokenizer import Prompt

ALICE, BOB, ROOT = Caller("alice"), Caller("bob"), Caller("root", is_admin=True)


def accepted() -> Accepted:
    queue = EventQueue(follows=True)
    nothing, scheduler = Prompt("", ()), Scheduler("ddim")
    params = GenerationParams(nothing, nothing, Size(width=64, height=64), scheduler, 4, 7.5, (1,))
    return Accepted(Request(params, table(scheduler, 4, NoiseSchedule()), (queue.on_event,), "a"), queue, 0)


async def end_once_cancelled(request: Request) -> None:
    """As the executor does."""
    while not (reason := request.cancelled):
        await asyncio.sleep(0)
    request.finish(Failed(reason))


def test_progress_follows_the_steps() -> None:
    async def follow() -> None:
        task, first = Task("alice", job_count=2), accepted()
        assert task.progress == 0.01
        assert task.seconds_left == 0
        following = asyncio.ensure_future(task.follow(first))
        first.request.notify(Started())
        first.request.notify(Stepped(2, 4))
        while task.step != 2:
            await asyncio.sleep(0)
        assert task.progress == 0.25
        assert task.seconds_left > 0
        first.request.finish(Completed(()))
        assert await following == Completed(())
        assert (task.progress, task.job_no) == (0.5, 1)

    asyncio.run(follow())


def test_interrupt_ends_the_running_request_and_all_that_follow() -> None:
    async def follow() -> None:
        task = Task("alice", job_count=3)
        for _ in range(2):
            one = accepted()
            ended = asyncio.ensure_future(end_once_cancelled(one.request))
            following = asyncio.ensure_future(task.follow(one))
            await asyncio.sleep(0)
            task.interrupt()
            outcome = await following
            assert isinstance(outcome, Failed)
            assert outcome.error is task.interrupted
            await ended

    asyncio.run(follow())


def test_skip_ends_the_running_request_alone() -> None:
    async def follow() -> None:
        task = Task("alice", job_count=2)
        task.skip()  # nothing runs
        assert not task.is_skipped
        first, second = accepted(), accepted()
        following = asyncio.ensure_future(task.follow(first))
        await asyncio.sleep(0)
        task.skip()
        await end_once_cancelled(first.request)
        assert isinstance(await following, Failed)
        assert task.is_skipped
        following = asyncio.ensure_future(task.follow(second))
        second.request.finish(Completed(()))
        assert await following == Completed(())
        assert not task.is_skipped

    asyncio.run(follow())


def test_whatever_ends_the_wait_ends_the_request() -> None:
    async def follow() -> None:
        task, one = Task("alice", job_count=1), accepted()
        following = asyncio.ensure_future(task.follow(one))
        await asyncio.sleep(0)
        following.cancel()
        with pytest.raises(asyncio.CancelledError):
            await following
        assert isinstance(one.request.cancelled, Cancelled)

    asyncio.run(follow())


def test_a_call_that_waits_for_a_place_wakes_when_it_is_interrupted() -> None:
    async def wait() -> None:
        task = Task("alice", job_count=2)
        asyncio.get_running_loop().call_soon(task.interrupt)
        started = time.monotonic()
        await task.sleep(60)
        assert time.monotonic() - started < 30
        await Task("alice", job_count=1).sleep(0)

    asyncio.run(wait())


class Busy:
    """Refuses so many requests, and accepts the next one."""

    def __init__(self, error: ServerError, times: int) -> None:
        self.error, self.times = error, times

    async def accept(self) -> Accepted:
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return accepted()


def test_the_first_request_of_a_call_is_refused_where_the_queue_is_full() -> None:
    with pytest.raises(QueueFull):
        asyncio.run(Task("alice", job_count=2).wait_for_place(Busy(QueueFull("Full."), 1).accept))


def test_later_requests_of_a_call_wait_for_a_place() -> None:
    busy = Busy(QueueFull("Full.", retry_after=1), 1)
    assert asyncio.run(Task("alice", job_count=2, job_no=1).wait_for_place(busy.accept)) is not None
    assert busy.times == -1


def test_other_errors_end_a_call_at_any_request() -> None:
    with pytest.raises(NotReady):
        asyncio.run(Task("alice", job_count=2, job_no=1).wait_for_place(Busy(NotReady("Draining."), 1).accept))


def test_an_interrupted_call_waits_for_no_place() -> None:
    async def wait() -> Accepted | None:
        task = Task("alice", job_count=2, job_no=1)
        asyncio.get_running_loop().call_later(0.05, task.interrupt)
        return await task.wait_for_place(Busy(QueueFull("Full.", retry_after=120), 1).accept)

    assert asyncio.run(wait()) is None


def test_callers_see_their_own_calls_and_administrators_all() -> None:
    async def look() -> None:
        tasks = Tasks()
        first, second, other = Task("alice", 1), Task("alice", 1), Task("bob", 1)
        async with tasks.running(other), tasks.running(first), tasks.running(second):
            assert list(tasks.of(ALICE)) == [first, second]
            assert list(tasks.of(BOB)) == [other]
            assert list(tasks.of(ROOT)) == [other, first, second]
        assert list(tasks.of(ROOT)) == []

    asyncio.run(look())
