"""The models, as the web UI names checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from server.api.problems import shorten
from server.api.sdapi.errors import rejected
from server.runtime.models import Model

_SHORT = 10  # digits of a hash
_MOST_TITLES = 10  # of an error


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

    @property
    def names(self) -> tuple[str, ...]:
        """What clients call it, from what is its own to what it may share with others."""
        return self.title, self.name, f"{self.name}.safetensors", self.sha256, self.short_hash


def checkpoint_of(model: Model) -> Checkpoint:
    """By the hash of its file, as in the web UI; of a folder, by that of all its files."""
    source = model.manifest.source
    return Checkpoint(model.name, source.file_sha256 or source.sha256)


def find_checkpoint(models: Iterable[Model], wanted: object, *, field: str) -> Model | None:
    """The model that a client calls `wanted`; None for None and the empty name. Raises InvalidRequest, of `field`."""
    if not wanted:
        return None
    known = [(name, model) for model in models for name in checkpoint_of(model).names]
    for fold in (str, str.casefold):
        for name, model in known:
            if isinstance(wanted, str) and fold(name) == fold(wanted):
                return model
    titles = [checkpoint_of(model).title for model in models][:_MOST_TITLES]
    raise rejected(field, f"{shorten(str(wanted))} is not served here: leave it out, or send {' or '.join(titles)}.")
