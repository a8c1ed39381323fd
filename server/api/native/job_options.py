"""What a request to generate says about becoming a job: `?wait=false`, and the header `Idempotency-Key`."""

from __future__ import annotations

import re
from typing import NamedTuple, Self

from fastapi import Request as HttpRequest

from server.requests.errors import FieldError, InvalidRequest

_KEY = re.compile(r'[\x21\x23-\x7e]{1,255}|"[\x20\x21\x23-\x5b\x5d-\x7e]{1,255}"')  # a token, or a string of RFC 9651
_WAIT = {"": True, "true": True, "1": True, "false": False, "0": False}


class JobOptions(NamedTuple):
    """Whether the caller waits for the images, and which request it is."""

    wait: bool = True
    key: str | None = None

    @classmethod
    def of(cls, http: HttpRequest) -> Self:
        """Raises InvalidRequest."""
        return cls(_wait(http), _key(http))

    @property
    def needs_job(self) -> bool:
        return not self.wait or self.key is not None


def _wait(http: HttpRequest) -> bool:
    if not http.scope["query_string"]:
        return True
    given = http.query_params.get("wait", "true").lower()
    if given not in _WAIT:
        raise _invalid("wait", "wait: it is true or false.")
    return _WAIT[given]


def _key(http: HttpRequest) -> str | None:
    given = http.headers.get("idempotency-key")
    if given is None:
        return None
    if not _KEY.fullmatch(given):
        raise _invalid("Idempotency-Key", "Idempotency-Key: send 1 to 255 visible ASCII characters, such as a UUID.")
    return given.strip('"')


def _invalid(name: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, fields=(FieldError(name, message),))
