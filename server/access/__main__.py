"""`python -m server.access NAME --file keys.toml`: make an API key, write its hash to the file, and show it once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_settings import CliPositionalArg

from engines.cli import CommandLine, Metavar, parse
from server.access import keys
from server.access.keys import KeyFileError

_HEAD = """\
# Hashes of API keys. `python -m server.access NAME --file THIS` adds one; to revoke one, remove its lines.
# A running server reads this file again when it changes. Keys of one name are one caller.
# Each may have limits of its own:  rate = "60/minute"  concurrency = 4
"""
_FAILED = 1  # exit code


class MakeKey(CommandLine):
    """Make an API key: it is shown once, and its hash is added to the file that `--api-keys` names."""

    name: Annotated[CliPositionalArg[str], Metavar("NAME"), AfterValidator(keys.check_name)] = Field(
        description="whose key it is; several keys of one name are one caller"
    )
    file: Path = Field(description="file of keys, which is created where there is none")
    admin: bool = Field(False, description="the key may also read /metrics, and administer the server")


def main(words: list[str]) -> int:
    """Make a key as `words` say; returns the exit code."""
    wanted = parse(MakeKey, words, prog="python -m server.access")
    key = keys.new_key()
    try:
        known = _add(wanted.file, keys.entry(wanted.name, key, admin=wanted.admin))
    except (OSError, KeyFileError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        sys.stderr.write(f"error: {wanted.file}: {reason}\n")
        return _FAILED
    sys.stdout.write(f"{key}\n")
    sys.stderr.write(f"This is the key of {wanted.name}, which is shown only now. {wanted.file} has {known} keys.\n")
    return 0


def _add(file: Path, lines: str) -> int:
    """Append to the file in one piece, and return how many keys it has then.

    It stays the same file, also where it is mounted into a container by itself.
    """
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    added = f"{'' if before.endswith(chr(10)) else chr(10)}\n{lines}" if before else f"{_HEAD}\n{lines}"
    known = len(keys.parse((before + added).encode()))
    with file.open("a", encoding="utf-8") as out:
        out.write(added)
    return known


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
