"""The HTTP application of a service, as its settings have it, for any ASGI server."""

from __future__ import annotations

import codecs
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from server.access.hosts import Hosts, hosts_to_answer
from server.access.key_file import KeyFile
from server.startup.settings import ServerSettings

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from server.api.service import Service

_log = logging.getLogger(__name__)
_OPEN = (
    "There are no API keys, and --host lets other machines connect: everyone who can may generate images and read "
    "/metrics. Give --api-keys FILE (`python -m server.access NAME --file FILE` makes a key), or let a proxy ask."
)


def application(service: Service, settings: ServerSettings, *, loopback: bool) -> Callable[[], ASGIApp]:
    """The factory of the application. API keys are read now, and watched from now on.

    With `loopback` only this machine connects, so that requests for other hosts are refused. The application's lifespan
    is to be run by the ASGI server, and the executor of the service to be started by the caller.

    Raises:
        KeyFileError: the file of API keys cannot be used.
    """
    keys = None if settings.api_keys is None else KeyFile(settings.api_keys)
    if keys is not None:
        keys.watch()
    elif not loopback:
        _log.warning("%s", _OPEN)
    return partial(_make, service, settings, keys, hosts_to_answer(settings.allowed_hosts, loopback=loopback))


def _make(service: Service, settings: ServerSettings, keys: KeyFile | None, hosts: Hosts | None) -> ASGIApp:
    from server.app import Access, make_app  # noqa: PLC0415 - a fifth of the start, while the engines are loaded

    access = Access(find=keys.find if keys else None, hosts=hosts, origins=settings.allowed_origins)
    return make_app(service, access, access_log=settings.access_log or settings.log_level == "debug")


async def use_libraries() -> None:
    """Load what libraries import at first use, by using it: a request must not fail because an import does."""
    import numpy as np  # noqa: PLC0415 - while the engines are loaded
    from PIL import Image  # noqa: PLC0415 - as above
    from starlette.concurrency import run_in_threadpool  # noqa: PLC0415 - as above

    codecs.lookup("utf-16-be")  # of the comment in EXIF
    np.median([0.0])  # of numpy.ma, for the step cache
    await run_in_threadpool(Image.preinit)  # the formats of uploads, and the threads that decode them
