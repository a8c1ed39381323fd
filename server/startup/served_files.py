"""The files of bundles from the check at the start to the end: what is served is what was hashed, or nothing is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.backends.available import check_fits, check_pools_fit, files_of
from engines.backends.registry import ON_CPU, TENSORRT
from engines.errors import BundleError, EngineError
from engines.held import HeldFiles
from engines.manifest import Manifest
from server.startup.bundles import FoundBundle, find_bundles
from server.startup.candidates import candidate_backends
from server.startup.settings import ServerSettings

_EVERY = 2.0  # seconds between looks at the files that stay mapped


@dataclass(frozen=True, slots=True)
class OpenedBundle:
    """A bundle whose files are verified, and the backends that may serve it."""

    name: str  # of its model, unique in the server
    folder: Path
    manifest: Manifest
    backends: Sequence[str]
    files: ServedFiles
    at_start: bool  # whether it is loaded at the start


def open_bundles(settings: ServerSettings) -> list[OpenedBundle]:
    """Read and verify the bundles. Raises EngineError where one of them is not served here, and says why.

    The backends are those of the first, and the others must have engines for them.
    """
    found = find_bundles(settings.bundle)
    names = [bundle.name for bundle in found]
    if unknown := [name for name in settings.load if name not in names]:
        raise EngineError(f"--load {unknown[0]}: there is no model of that name ({', '.join(names)}).")
    held = [bundle.manifest.hold(bundle.folder) for bundle in found]
    backends = candidate_backends(settings, found[0].manifest)
    for bundle in found:
        _check_backends(bundle, backends, compiles=settings.compile, is_first=bundle is found[0])
    opened = []
    for (name, folder, manifest), files in zip(found, held, strict=True):
        files.verify(later=_read_whole(manifest, backends, folder))
        at_start = not settings.load or name in settings.load
        opened.append(OpenedBundle(name, folder, manifest, backends, ServedFiles(folder, files), at_start))
    return opened


def _check_backends(bundle: FoundBundle, backends: Sequence[str], *, compiles: bool, is_first: bool) -> None:
    for backend in backends:
        check_pools_fit(bundle.manifest, backend)
        if not compiles:
            check_fits(bundle.manifest, backend, bundle.folder)
        if not (compiles or is_first):  # of the first, loading says so
            files_of(bundle.manifest, backend, bundle.folder)


def _read_whole(manifest: Manifest, backends: Sequence[str], bundle: Path) -> set[Path]:
    """Files that are hashed when they are read, and not twice: TensorRT's engines, if only they can be served."""
    (backend, *others) = backends
    if others or backend not in TENSORRT or backend not in manifest.builds:
        return set()
    return files_of(manifest, backend, bundle)


class ServedFiles:
    """Gives out what was hashed, and notices when a file that stays mapped no longer is that."""

    def __init__(self, bundle: Path, files: HeldFiles, *, every: float = _EVERY) -> None:
        """`files` of `bundle` are verified; those that stay mapped are looked at `every` so many seconds."""
        self._bundle = bundle
        self._files = files
        self._every = every
        self._is_first = True  # load
        self._unloaded = threading.Event()

    def read(self, path: Path) -> bytes:
        """The contents of a file of the bundle, which have its hash. Raises BundleError."""
        return self._files.read(path)

    def prepare(self, manifest: Manifest, backend: str) -> None:
        """Before each load: open and verify the files of `manifest`, unless it is the first. Raises BundleError."""
        if self._is_first:
            self._is_first = False
            return
        self.replace(manifest)
        self._files.verify(later=_read_whole(manifest, [backend], self._bundle))

    def replace(self, manifest: Manifest) -> None:
        """Give out the files of `manifest`, after engines were compiled. Raises BundleError."""
        self._files.close()
        self._files = manifest.hold(self._bundle)

    def loaded(self, manifest: Manifest, backend: str, on_change: Callable[[BundleError], None]) -> None:
        """Check that the engines were loaded from the verified files, and go on watching those that stay mapped.

        `on_change` is called once, in a thread of its own, when one of them was altered.

        Raises:
            BundleError: a file was replaced or written to since its hash was taken.
        """
        self._files.keep(files_of(manifest, backend, self._bundle))
        self._files.check_unchanged()
        if backend in ON_CPU:
            self._unloaded = threading.Event()
            watched = self._files, self._unloaded, on_change
            threading.Thread(target=self._watch, args=watched, name="files", daemon=True).start()
        else:  # GPUs have a copy of the weights
            self._files.close()

    def unloaded(self) -> None:
        """Watch the files no longer: nothing is served from them."""
        self._unloaded.set()
        self._files.close()

    def _watch(self, files: HeldFiles, unloaded: threading.Event, on_change: Callable[[BundleError], None]) -> None:
        while not unloaded.wait(self._every):
            try:
                files.check_contents()
            except BundleError as error:
                on_change(error)
                return
