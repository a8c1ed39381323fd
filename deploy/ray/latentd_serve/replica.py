"""A replica: a service with its models on one GPU, and its HTTP application, which the ingress calls."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ray import serve
from starlette.types import Message
from uvicorn import Config
from uvicorn.lifespan.on import LifespanOn

from engines.errors import EngineError
from latentd_serve.forwarding import ForwardedRequest, respond
from latentd_serve.routing import LORAS, MODELS
from latentd_serve.settings import Arguments
from server.api.loras import loras_of
from server.api.service import Service
from server.startup.application import application, use_libraries
from server.startup.memory import return_large_blocks
from server.startup.served_files import open_bundles
from server.startup.settings import ServerSettings
from server.startup.wiring import make_service

_log = logging.getLogger("latentd")
_OURS = ("latentd", "server", "engines", "latentd_serve")  # loggers
_FAULT = 70  # exit code: EX_SOFTWARE
_ANSWER_SECONDS = 1.0  # after a fault, in which callers read their answers


class Images:
    """The deployment. A replica is ready when its constructor returns: its engines are compiled, loaded and warm."""

    async def __init__(self, arguments: Arguments) -> None:  # type: ignore[misc] # as Serve allows
        """Raises EngineError, with what to do, which Serve shows as the reason of a failed deployment."""
        settings = arguments.settings()
        use_serves_log(settings)
        return_large_blocks()
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.name = serve.get_replica_context().replica_id.unique_id
        await self._open(settings, arguments)
        await self._started

    async def _open(self, settings: ServerSettings, arguments: Arguments) -> None:
        loop = asyncio.get_running_loop()
        bundles = await asyncio.to_thread(open_bundles, settings)  # reads and hashes every file
        self._service = make_service(
            bundles,
            settings=settings,
            on_ready=lambda: self._ready(loop),
            on_failure=lambda error: self._failed(error, loop),
            load_seconds=arguments.load_seconds,
        )
        self._app = application(self._service, settings, loopback=False)()
        self._root_path = settings.root_path
        self._lifespan = LifespanOn(Config(self._app, lifespan="on", log_config=None))
        await self._lifespan.startup()
        await use_libraries()
        self._service.runtime.executor.start()

    def _ready(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_soon_threadsafe(self._started.set_result, None)

    def _failed(self, error: Exception, loop: asyncio.AbstractEventLoop) -> None:
        """The executor has ended, and answered everyone. Before the replica is ready its constructor fails.

        Later its process ends, and Serve starts another: until its health is asked for, it would refuse requests, and
        so quickly that it seems the least busy replica.
        """
        if not self._service.runtime.executor.was_ready:
            loop.call_soon_threadsafe(self._started.set_exception, _start_error(error))
            return
        _log.critical("the executor ended: the process ends, and Serve starts another replica", exc_info=error)
        threading.Timer(_ANSWER_SECONDS, os._exit, (_FAULT,)).start()

    async def respond(self, request: ForwardedRequest) -> AsyncIterator[str | list[Message]]:
        """The name of this replica at once, then the messages of the response."""
        yield self.name
        async for messages in respond(self._app, self._below_root(request)):
            for message in messages:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"x-replica", self.name.encode())]
            yield messages

    async def whole(self, request: ForwardedRequest) -> tuple[str, list[Message]]:
        """The name of the replica, and its whole response."""
        return self.name, [
            message async for messages in respond(self._app, self._below_root(request)) for message in messages
        ]

    def _below_root(self, request: ForwardedRequest) -> ForwardedRequest:
        """The request below the server's `root_path`, as uvicorn has it."""
        if not self._root_path:
            return request
        path = self._root_path + request.scope["path"]
        scope = {**request.scope, "root_path": self._root_path, "path": path}
        return ForwardedRequest(scope=scope, body=request.body, wanted=request.wanted)

    async def record_routing_stats(self) -> dict[str, Any]:
        """What this replica holds, for `HoldersFirst`."""
        models = [model.name for model in self._service.models if model.state == "ready"]
        loras = await asyncio.to_thread(_resident_loras, self._service)
        return {MODELS: models, LORAS: loras}

    async def check_health(self) -> None:
        """Raise where the replica should be replaced: a model that an administrator unloaded is no reason."""
        executor = self._service.runtime.executor
        if not executor.alive:
            raise RuntimeError(f"The executor is {executor.status}.")
        broken = [model for model in self._service.models if model.state == "ready" and model.health.reason]
        if broken:
            raise RuntimeError(f"{broken[0].name}: {broken[0].health.reason}")

    async def __del__(self) -> None:
        """Serve has waited for the requests. The executor's thread ends, and gives back the device's memory."""
        if hasattr(self, "_lifespan"):
            await self._lifespan.shutdown()


def use_serves_log(settings: ServerSettings) -> None:
    """Write our messages where Serve writes its own: its handlers and formats stay as they are."""
    handlers = logging.getLogger("ray.serve").handlers
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = list(handlers), False
        logger.setLevel(settings.log_level.upper())


def _resident_loras(service: Service) -> Sequence[str]:
    """The names, without folders, of the LoRAs on the device."""
    models = [model for model in service.models if model.resident_loras]
    return sorted({lora.name.rpartition("/")[2] for model in models for lora in loras_of(model) if lora.resident})


def _start_error(error: Exception) -> Exception:
    return error if isinstance(error, EngineError) else RuntimeError(f"The engines were not loaded: {error}")
