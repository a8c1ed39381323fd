"""Requests that a single replica must not answer for all: what is refused, and what all replicas are asked."""

from __future__ import annotations

import re

from fastapi import Request as HttpRequest

from server.api.native.job_options import JobOptions
from server.requests.errors import FieldError, InvalidRequest, NotFound

_ALL = re.compile(r"(/.*)?(/metrics|/v2/repository/models/.+/(load|unload))/?")
_JOBS = re.compile(r"(/.*)?/jobs(/.*)?")
_GENERATE = re.compile(r"(/.*)?/generate/?")
_NO_JOBS = "There are no jobs on Ray Serve, where they would end with their replica"


def is_for_all(path: str) -> bool:
    """Whether every replica answers: their metrics, and loading and unloading of models."""
    return _ALL.fullmatch(path) is not None


def check_supported(http: HttpRequest) -> None:
    """Refuse jobs. Raises NotFound, InvalidRequest."""
    path = http.scope["path"]
    if _JOBS.fullmatch(path):
        raise NotFound(f"{_NO_JOBS}: wait for the images, or follow their events.")
    if not _GENERATE.fullmatch(path):
        return
    options = JobOptions.of(http)
    if not options.wait:
        raise _refused("wait", "leave out wait=false, and wait for the images or follow their events.")
    if options.key is not None:
        raise _refused("Idempotency-Key", "leave out Idempotency-Key; an answer that was lost is made again.")


def _refused(name: str, advice: str) -> InvalidRequest:
    message = f"{_NO_JOBS}: {advice}"
    return InvalidRequest(message, fields=(FieldError(name, message),))
