"""API keys as the server knows them: the SHA-256 of each, in a TOML file."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from server.access.rates import check_rate
from server.requests.context import Allowance, Caller

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_PREFIX = "latentd_"  # by which tools that look for leaked secrets know a key
_BYTES = 32  # of randomness in a key


class KeyFileError(Exception):
    """The file of API keys cannot be used; the message says why."""


def check_name(text: str) -> str:
    """`text`, if it can name a caller. Raises ValueError."""
    if not NAME.fullmatch(text):
        raise ValueError("write letters, digits, and . _ @ - after the first of them, 64 at most")
    return text


class _Key(BaseModel):
    """One key of the file. Keys of one name are one caller."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, AfterValidator(check_name)]
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    admin: bool = False
    rate: Annotated[str, AfterValidator(check_rate)] | None = None
    concurrency: int | None = Field(None, ge=1)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    keys: list[_Key] = Field(min_length=1)


def new_key() -> str:
    """A key that nobody guesses: 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(_BYTES)


def digest(key: str) -> str:
    """The SHA-256 of a key. Keys are random and long, so that a slow hash, as for passwords, would protect nothing."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def entry(name: str, key: str, *, admin: bool) -> str:
    """The lines of the file for a new key."""
    return f'[[keys]]\nname = "{name}"\nsha256 = "{digest(key)}"\n' + ("admin = true\n" if admin else "")


def parse(content: bytes) -> dict[str, Caller]:
    """The callers in a file, by the digests of their keys. Raises KeyFileError."""
    try:
        listed = _File.model_validate(tomllib.loads(content.decode()))
    except UnicodeDecodeError:
        raise KeyFileError("it is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise KeyFileError(f"it is not valid TOML: {error}") from None
    except ValidationError as error:
        raise KeyFileError(_explained(error)) from None
    callers = {key.sha256: _caller(key) for key in listed.keys}
    if len(callers) < len(listed.keys):
        raise KeyFileError("two keys have the same sha256")
    return callers


def find(callers: Mapping[str, Caller], key: str) -> Caller | None:
    """The caller that `key` belongs to. Every entry is compared, in constant time."""
    sent = digest(key)
    matching = [caller for known, caller in callers.items() if hmac.compare_digest(known, sent)]
    return matching[0] if matching else None


def _caller(key: _Key) -> Caller:
    return Caller(key.name, key.admin, Allowance(key.rate, key.concurrency))


def _explained(error: ValidationError) -> str:
    """The first error, without the value: somebody may have written a key where its hash belongs."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    return f"{place}: {first['msg'].removeprefix('Value error, ')}"
