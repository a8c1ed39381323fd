"""The ingress before replicas that die, hang and are full. Serve's handle is replaced, where a cluster would be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import httpx
import pytest
from latentd_serve.ingress import Forwarder
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError
from starlette.types import Message

from server.api.body_limits import BodyLimits

_START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"a"), (b"x-b", b"c")]}
_STREAM: Message = {**_START, "headers": [(b"content-type", b"text/event-stream")]}
_BODY: Message = {"type": "http.response.body", "body": b"image", "more_body": False}
_PART: Message = {"type": "http.response.body", "body": b"event: step\n\n", "more_body": True}
_LOST = [ActorDiedError(), ActorUnavailableError("gone", None), asyncio.CancelledError()]

Step = str | Sequence[Message] | BaseException | float


class _Answer:
    """What a replica sends, in steps: its name, messages, an error, or seconds of silence."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = iter(steps)
        self.cancelled = False

    async def __anext__(self) -> str | list[Message]:
        step = next(self._steps, None)
        if step is None:
            raise StopAsyncIteration
        if isinstance(step, BaseException):
            raise step
        if isinstance(step, float):
            await asyncio.sleep(step)
            return []
        return step if isinstance(step, str) else [dict(message) for message in step]

    def cancel(self) -> None:
        self.cancelled = True


class _Handle:
    """Replicas that answer in turn."""

    def __init__(self, *answers: Sequence[Step]) -> None:
        self.answers = [_Answer(steps) for steps in answers]
        self.requests: list[Any] = []

    def options(self, **_options: object) -> _Handle:
        return self

    def remote(self, request: object) -> _Answer:
        self.requests.append(request)
        return self.answers[len(self.requests) - 1]


def _send(handle: _Handle, path: str = "/generate", **options: Any) -> httpx.Response:
    app = Forwarder(cast(Any, handle), wait_seconds=0.2, bodies=BodyLimits())

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(cast(Any, app))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json={"prompt": "a"}, **options)

    return asyncio.run(send())


def test_a_response_passes_unchanged_but_for_the_id_that_serves_proxy_adds() -> None:
    answer = _send(_Handle(["a", [_START, _BODY]]))
    assert (answer.status_code, answer.content, dict(answer.headers)) == (200, b"image", {"x-b": "c"})


@pytest.mark.parametrize("error", _LOST, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("reached", [True, False])
def test_a_replica_that_dies_before_anything_was_shown_costs_one_retry(error: BaseException, reached: bool) -> None:
    first: list[Step] = ["a", error] if reached else [error]
    handle = _Handle(first, ["a", [_START, _BODY]])
    answer = _send(handle)
    assert (answer.status_code, answer.headers["x-retried"], answer.content) == (200, "1", b"image")
    assert handle.requests[1] == replace(handle.requests[0], lost="a" if reached else "")


def test_a_second_death_is_answered_with_503_and_when_to_come_back() -> None:
    answer = _send(_Handle([ActorDiedError()], ["a", ActorDiedError()]))
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) >= 5
    assert "send the request again" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("path", "status_of"),
    [
        ("/generate", lambda data: data["status"]),
        ("/v1/images/generations", lambda data: {"server_error": 503}[data["error"]["type"]]),
    ],
)
def test_a_stream_that_has_begun_ends_with_an_error_event(path: str, status_of: Callable[[Any], int]) -> None:
    handle = _Handle(["a", [_STREAM, _PART], ActorDiedError()])
    answer = _send(handle, path)
    *_, last = answer.text.strip().split("\n\n")
    name, data = last.split("\n")
    assert (answer.status_code, len(handle.requests), name) == (200, 1, "event: error")
    assert status_of(json.loads(data.removeprefix("data: "))) == 503


def test_full_queues_are_answered_with_429_and_when_to_come_back() -> None:
    answer = _send(_Handle([BackPressureError(5, 5)]))
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 5


def test_a_request_waits_only_so_long_for_a_replica_with_room() -> None:
    handle = _Handle([30.0])
    answer = _send(handle)
    assert (answer.status_code, handle.answers[0].cancelled) == (503, True)
    assert "No replica had room in 0.2 seconds" in answer.json()["detail"]


def test_a_request_that_has_reached_a_replica_waits_as_long_as_that_takes() -> None:
    assert _send(_Handle(["a", 0.5, [_START, _BODY]])).status_code == 200


def test_a_caller_that_leaves_cancels_its_request() -> None:
    handle = _Handle(["a", 30.0])
    app = Forwarder(cast(Any, handle), wait_seconds=1, bodies=BodyLimits())

    async def leave() -> None:
        messages: AsyncIterator[Message] = _received()
        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": [], "query_string": b""}
        serving = asyncio.create_task(app(scope, messages.__anext__, _ignore))
        await asyncio.sleep(0.1)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving

    asyncio.run(leave())
    assert handle.answers[0].cancelled
    assert len(handle.requests) == 1


async def _received() -> AsyncIterator[Message]:
    yield {"type": "http.request", "body": b"{}", "more_body": False}


async def _ignore(_message: Message) -> None:
    pass
