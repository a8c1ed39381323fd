"""The served model, as the web UI names checkpoints."""

from __future__ import annotations

from typing import NamedTuple

from engines.manifest import Manifest
from server.api.problems import shorten
from server.api.sdapi.errors import rejected

_SHORT = 10  # digits of a hash


class Checkpoint(NamedTuple):
    """A checkpoint by its names."""

    name: str
    sha256: str

    @property
    def short_hash(self) -> str:
        return self.sha256[:_SHORT]

    @property
    def title(self) -> str:
        return f"{self.name} [{self.short_hash}]"

    def check(self, name: object, *, field: str) -> None:
        """Raise InvalidRequest unless `name` is this checkpoint; None and the empty name are."""
        names = {self.title, self.name, self.short_hash, self.sha256, f"{self.name}.safetensors"}
        if name and (not isinstance(name, str) or name.casefold() not in {one.casefold() for one in names}):
            raise rejected(field, f"{shorten(str(name))} is not served here: leave it out, or send {self.title}.")


def checkpoint_of(manifest: Manifest) -> Checkpoint:
    return Checkpoint(manifest.name, manifest.source.sha256)
