"""Which backends a bundle may be served with on this machine."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from engines.backends.available import choose, unavailable_reason
from engines.backends.registry import BACKENDS, ON_CPU
from engines.manifest import Manifest
from server.startup.settings import AUTO, ServerSettings

_log = logging.getLogger(__name__)


def candidate_backends(settings: ServerSettings, manifest: Manifest) -> Sequence[str]:
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
