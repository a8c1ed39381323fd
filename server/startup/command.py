"""The command: settings and manifest are read and checked, then the service runs until it is stopped."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress

from engines.cli import parse
from engines.errors import EngineError
from server.access.keys import KeyFileError
from server.runtime.failures import StartStopped
from server.runtime.models import Models
from server.startup import logs
from server.startup.http_server import listen, make_http_server, url_of
from server.startup.memory import return_large_blocks
from server.startup.served_files import OpenedBundle, open_bundles
from server.startup.settings import ServerSettings, unknown_variables
from server.startup.signals import StopSignals
from server.startup.stopping import Stopping
from server.startup.wiring import make_service

_log = logging.getLogger("latentd")
_FAILED_START, _FAULT = 1, 70  # exit codes; 70 is EX_SOFTWARE: the supervisor should start another


def run(argv: Sequence[str], signals: StopSignals) -> int:
    """Serve as `argv` says; returns the exit code."""
    settings = parse(ServerSettings, argv)
    logs.start(settings.log_level, settings.log_format)
    for sentence in unknown_variables(os.environ):
        _log.warning("%s", sentence)
    with suppress(RuntimeError, OSError, ValueError):  # without a standard error that has a descriptor
        faulthandler.enable()  # a bus error, say, of a file that was cut while it is mapped, is not silent
    return_large_blocks()
    try:
        bundles = open_bundles(settings)
    except EngineError as error:
        _print_error(str(error))
        return _FAILED_START
    return _serve(settings, bundles, signals)


def _serve(settings: ServerSettings, bundles: Sequence[OpenedBundle], signals: StopSignals) -> int:
    exit_code = 0

    def on_ready() -> None:
        if not server.should_exit:  # else it is ready too late, and its socket is closed
            _print(_ready_message(service.models, url_of(listener)))

    def on_failure(error: Exception) -> None:
        nonlocal exit_code
        if isinstance(error, StartStopped):
            _log.info("%s", error)
            return
        if isinstance(error, EngineError):
            _print_error(str(error))
        else:
            _log.critical("the executor ended", exc_info=error)
        exit_code = _FAULT if service.runtime.executor.was_ready else _FAILED_START
        stopping.after_fault()

    try:
        service = make_service(bundles, settings=settings, on_ready=on_ready, on_failure=on_failure)
    except EngineError as error:
        _print_error(str(error))
        return _FAILED_START
    service.runtime.metrics.add_counter("latentd_log_messages_lost", "Log messages that were not written.", logs.lost)
    try:
        listener = listen(settings.host, settings.port)
        server = make_http_server(service, settings, listener)
    except OSError as error:
        _print_error(f"{error.strerror}: choose another --host or --port.")
        return _FAILED_START
    except KeyFileError as error:
        _print_error(str(error))
        return _FAILED_START
    executor = service.runtime.executor
    stopping = Stopping(signals, server, executor, drain_seconds=settings.drain_seconds, exit_code=lambda: exit_code)
    stopping.start()
    executor.start()
    server.run(sockets=[listener])
    if service.spans:
        service.spans.close()
    if executor.hangs:
        logging.shutdown()
        os._exit(exit_code)  # an interpreter that ends in order would wait for the thread that hangs in the driver
    return exit_code


def _ready_message(models: Models, url: str) -> str:
    first, others = models.default, [model.name for model in models if model.ready and model is not models.default]
    example = next(iter(first.manifest.examples), "a red heart on a yellow background")
    prompt = json.dumps({"prompt": example, "seed": 7})
    loaded = f", with {', '.join(others)}," if others else ""
    return f"""
{first.name}{loaded} is ready: open {url}

  curl -s -H 'Content-Type: application/json' -H 'Accept: image/png' \\
    -d {shlex.quote(prompt)} {url}/generate > picture.png

The API is described at {url}/docs. Stop with Ctrl-C.
"""


def _print(text: str) -> None:
    logs.announce(text)


def _print_error(text: str) -> None:
    logs.announce(f"error: {text}", "ERROR")
