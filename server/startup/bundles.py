"""Which bundles are served, and by what names: those of `--bundle`, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from engines.errors import EngineError
from engines.manifest import MANIFEST, Manifest

_NAMED = re.compile(r"(?P<name>[^/=]*)=(?P<folder>.*)", re.DOTALL)  # a folder whose name has an = is ./NAME
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)


class FoundBundle(NamedTuple):
    """A bundle to be served, whose files are not yet verified."""

    name: str  # of its model, unique among those of the server
    folder: Path
    manifest: Manifest


def find_bundles(given: Sequence[str]) -> list[FoundBundle]:
    """The bundles that `given` stand for: each is DIR or NAME=DIR, where DIR is a bundle, or alone a folder of bundles.

    Raises:
        EngineError: one of them is no bundle, or two have the same name.
    """
    if not given:
        raise EngineError("There is no model to serve: give --bundle DIR.")
    found = [bundle for text in given for bundle in _read(text)]
    folders: dict[str, Path] = {}
    for name, folder, _ in found:
        if name in folders:
            raise EngineError(
                f"{folders[name]} and {folder} are both named {name}: give one another name, as --bundle NAME={folder}."
            )
        folders[name] = folder
    return found


def _read(text: str) -> Iterator[FoundBundle]:
    match = _NAMED.fullmatch(text)
    if match is None:
        for folder in _bundles_in(Path(text)):
            manifest = Manifest.read(folder)
            yield FoundBundle(manifest.name, folder, manifest)
        return
    if not _NAME.fullmatch(match["name"]):
        raise EngineError(
            f"--bundle {text}: the name before = may have letters, digits, and . _ - after the first of them "
            "(a folder of that name is ./FOLDER)."
        )
    folder = Path(match["folder"])
    yield FoundBundle(match["name"], folder, Manifest.read(folder))


def _bundles_in(folder: Path) -> list[Path]:
    """The folder itself, or the bundles in a folder that is none."""
    if (folder / MANIFEST).exists():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{MANIFEST}")) or [folder]
