"""The ingress: forwards each HTTP request to a replica, and to another one if that dies before anything was shown."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

from fastapi import Request as HttpRequest
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from latentd_serve.forwarding import ForwardedRequest, error_event, starts_stream
from latentd_serve.metrics import merged_metrics
from latentd_serve.refusals import check_supported, is_for_all
from latentd_serve.wanted import wanted_by
from server.api.bodies import check_size
from server.api.body_limits import BodyLimits
from server.api.error_responses import error_response
from server.requests.errors import Cancelled, InternalError, NotReady, QueueFull, ServerError

_log = logging.getLogger(__name__)
_SOON = 5  # seconds until callers who were refused should come back
_ATTEMPTS = 2
_ALL_SECONDS = 150.0  # for requests to all replicas, which may load a model


class ReplicaLost(Exception):
    """The replica of a request has died, or has been taken away."""

    def __init__(self, reason: str, replica: str) -> None:
        super().__init__(f"{replica or 'before it had the request'} ({reason})")
        self.replica = replica  # its name; "" where it is not known


class Forwarder:
    """An ASGI application before the replicas."""

    def __init__(self, images: DeploymentHandle[object], *, wait_seconds: float, bodies: BodyLimits) -> None:
        self._images = images
        self._wait_seconds = wait_seconds
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await _lifespan(receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1000})
        http = HttpRequest(scope, receive)
        response = _Response(scope, send)
        try:
            check_supported(http)
            with self._bodies.lease() as lease:
                body = bytearray()
                async for chunk in http.stream():
                    check_size(len(body) + len(chunk))
                    lease.grow_to(len(body) + len(chunk))
                    body += chunk
                request = ForwardedRequest.of(scope, bytes(body), wanted_by(scope, bytes(body)))
                del body
                await self._forward(request, response)
        except ServerError as error:
            await response.end(http, error)
        except ClientDisconnect:
            pass
        return None

    async def _forward(self, request: ForwardedRequest, response: _Response) -> None:
        """Pass on what a replica answers. Raises ServerError."""
        if is_for_all(request.scope["path"]):
            return await response.pass_on(await self._ask_all(request))
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                async with aclosing(self._ask(request)) as answer:
                    async for messages in answer:
                        await response.pass_on(messages, retried=attempt > 1)
            except ReplicaLost as lost:
                _log.warning("a replica was lost: %s (attempt %d)", lost, attempt)
                if response.started or attempt == _ATTEMPTS:
                    message = "The replica of this request was lost: send the request again."
                    raise NotReady(message, retry_after=_SOON) from None
                request = replace(request, lost=lost.replica)
            else:
                break
        if not response.started:
            raise InternalError("The replica sent no response; see its log.")
        return None

    async def _ask(self, request: ForwardedRequest) -> AsyncGenerator[list[Message]]:
        """What one replica answers. Raises ReplicaLost, NotReady, QueueFull."""
        streamed = self._images.options(method_name="respond", stream=True).remote(request)
        answer = cast(DeploymentResponseGenerator[Any], streamed)
        replica = ""
        try:
            replica = await asyncio.wait_for(anext(answer), self._wait_seconds)
            while True:
                yield await anext(answer)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise NotReady(
                f"No replica had room in {self._wait_seconds:g} seconds: try again.", retry_after=_SOON
            ) from None
        except BackPressureError:
            raise QueueFull("The queues of all replicas are full: try again later.", retry_after=_SOON) from None
        except DeploymentUnavailableError as error:
            raise NotReady(error.message, retry_after=_SOON) from None
        except RayTaskError as error:
            _log.exception("a replica raised")
            raise InternalError("Unexpected server error; see the replica's log.") from error
        except (RayError, RayServeException) as error:
            raise ReplicaLost(type(error).__name__, replica) from error
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            raise ReplicaLost("it cancelled the request", replica) from None
        finally:
            answer.cancel()  # type: ignore[no-untyped-call] # without effect on one that has ended

    async def _ask_all(self, request: ForwardedRequest) -> list[Message]:
        """What all replicas answer: the metrics of each, or the first answer that is an error. Raises ServerError."""
        try:
            asked = self._images.broadcast("whole", request)
            answers = await asked.results_async(timeout_s=_ALL_SECONDS, return_exceptions=True)
        except TimeoutError:
            raise NotReady("Not every replica has answered: try again.", retry_after=_SOON) from None
        answered = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not answered:
            raise NotReady("No replica is ready: try again.", retry_after=_SOON)
        failed = [messages for _, messages in answered if messages[0]["status"] >= 400]
        if failed:
            return list(failed[0])
        return merged_metrics(answered) if request.scope["path"].endswith("/metrics") else list(answered[0][1])


class _Response:
    """What the caller has been sent."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self._path: str = scope["path"]
        self._streams = False
        self.started = False

    async def pass_on(self, messages: list[Message], *, retried: bool = False) -> None:
        for message in messages:
            if message["type"] == "http.response.start":
                self.started = True
                self._streams = starts_stream(message)
                message["headers"] = _headers(message, retried=retried)
            await self._send(message)

    async def end(self, http: HttpRequest, error: ServerError) -> None:
        """Answer with an error; a stream of events ends with one."""
        if isinstance(error, Cancelled):
            return
        if not self.started:
            await error_response(http, error)(http.scope, http.receive, self._send)
        elif self._streams:
            await self._send({"type": "http.response.body", "body": error_event(self._path, error)})


def _headers(start: Message, *, retried: bool) -> list[tuple[bytes, bytes]]:
    """The replica's, without the request's id, which Serve's proxy adds, and with a mark of a retry."""
    headers = [(name, value) for name, value in start["headers"] if name.lower() != b"x-request-id"]
    return [*headers, (b"x-retried", b"1")] if retried else headers


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
