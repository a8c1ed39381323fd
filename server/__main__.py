"""`python -m server`: check the bundle, start the service, say where it is."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import uvicorn

from engines.backends.available import check_fits, choose, unavailable_reason
from engines.backends.registry import BACKENDS, ON_CPU
from engines.cli import parse
from engines.errors import EngineError
from engines.manifest import Manifest
from server.startup.autotune import MeasuringStopped
from server.startup.compiling import CompilingStopped
from server.startup.settings import AUTO, ServerSettings
from server.startup.wiring import make_service

if TYPE_CHECKING:
    from fastapi import FastAPI

    from server.api.service import Service

_log = logging.getLogger("latentd")
_FAILED_START, _FAULT = 1, 70  # exit codes; 70 is EX_SOFTWARE: the supervisor should start another
_CANCEL_SECONDS = 2  # in which cancelled requests are answered


def main(argv: Sequence[str] | None = None) -> int:
    settings = parse(ServerSettings, sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        manifest = Manifest.load(settings.bundle)
        backends = _candidate_backends(settings, manifest)
        if not settings.compile:
            for backend in backends:
                check_fits(manifest, backend, settings.bundle)
    except EngineError as error:
        _print_error(str(error))
        return _FAILED_START
    return _serve(settings, manifest, backends)


def _candidate_backends(settings: ServerSettings, manifest: Manifest) -> Sequence[str]:
    """The backend to serve with; or several, all on the CPU, of which the fastest is to be found by measuring.

    Those are asked for by name, or left where no build of the bundle runs here.
    """
    if settings.backend not in (None, AUTO):
        return [settings.backend]
    wanted = list(BACKENDS if settings.compile else manifest.builds)
    if settings.backend == AUTO or settings.compile:
        wanted = [backend for backend in wanted if backend not in ON_CPU]
    choice = choose([*wanted, *ON_CPU])
    if wanted and choice.backend != wanted[0]:
        _log.warning("backend %s is unavailable (%s)", wanted[0], choice.reason)
    if choice.backend in wanted:
        return [choice.backend]
    return [backend for backend in ON_CPU if unavailable_reason(backend) is None]


class _Server(uvicorn.Server):
    """Cancels requests that outlast the drain, so that their callers get an answer; uvicorn would disconnect them."""

    def __init__(self, config: uvicorn.Config, *, drain_seconds: int, cancel: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain_seconds = drain_seconds
        self._cancel = cancel

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._drain_seconds, self._cancel)
        await super().shutdown(sockets)


def _serve(settings: ServerSettings, manifest: Manifest, backends: Sequence[str]) -> int:
    exit_code = _FAILED_START

    def on_ready() -> None:
        nonlocal exit_code
        exit_code = 0
        if not server.should_exit:  # else it is ready too late, and its socket is closed
            _print(_ready_message(manifest, _url(listener)))

    def on_failure(error: Exception) -> None:
        nonlocal exit_code
        if isinstance(error, CompilingStopped | MeasuringStopped):
            exit_code = 0  # stopped on request
            _print(str(error))
            return
        if isinstance(error, EngineError):
            _print_error(str(error))
        else:
            _log.critical("the executor ended", exc_info=error)
        exit_code = exit_code or _FAULT
        server.should_exit = True

    service = make_service(
        manifest,
        settings.bundle,
        backends=backends,
        settings=settings,
        on_ready=on_ready,
        on_failure=on_failure,
    )
    config = uvicorn.Config(
        partial(_app, service),
        factory=True,
        ws="none",
        host=settings.host,
        port=settings.port,
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=settings.drain_seconds + _CANCEL_SECONDS,
    )
    try:
        listener = _listen(settings.host, settings.port)
    except OSError as error:
        _print_error(f"{error.strerror}: choose another --host or --port.")
        return _FAILED_START
    server = _Server(config, drain_seconds=settings.drain_seconds, cancel=service.runtime.batcher.cancel)
    service.runtime.executor.start()
    server.run(sockets=[listener])
    if service.runtime.executor.hangs:
        logging.shutdown()
        os._exit(exit_code)  # an interpreter that ends in order would wait for the thread that hangs in the driver
    return exit_code


def _app(service: Service) -> FastAPI:
    from server.app import make_app  # noqa: PLC0415 - a fifth of the start, which passes while the engines are loaded

    return make_app(service)


def _listen(host: str, port: int) -> socket.socket:
    if ":" not in host:
        listener = socket.create_server((host, port))
    else:
        dualstack = socket.has_dualstack_ipv6()
        listener = socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=dualstack)
    # Connections inherit it, and asyncio sets it on none of a listener that it is given: an answer's body would wait,
    # 40 ms on Linux, until the caller has acknowledged the headers. (uvloop sets it on all.)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _ready_message(manifest: Manifest, url: str) -> str:
    prompt = json.dumps({"prompt": next(iter(manifest.examples), "a red heart on a yellow background"), "seed": 7})
    return f"""
{manifest.name} is ready: open {url}

  curl -s -H 'Content-Type: application/json' -H 'Accept: image/png' \\
    -d {shlex.quote(prompt)} {url}/generate > picture.png

The API is described at {url}/docs. Stop with Ctrl-C.
"""


def _print(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _print_error(text: str) -> None:
    _print(f"error: {text}")


if __name__ == "__main__":
    sys.exit(main())
