"""The bundle's files from the check at the start to the end: what is served is what was hashed, or nothing is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.backends.available import check_fits, check_pools_fit, files_of
from engines.backends.registry import ON_CPU, TENSORRT
from engines.errors import BundleError
from engines.held import HeldFiles
from engines.manifest import Manifest
from server.startup.candidates import candidate_backends
from server.startup.settings import ServerSettings

_EVERY = 2.0  # seconds between looks at the files that stay mapped


@dataclass(frozen=True, slots=True)
class OpenedBundle:
    """A bundle whose files are verified, and the backends that may serve it."""

    manifest: Manifest
    backends: Sequence[str]
    files: ServedFiles


def open_bundle(settings: ServerSettings) -> OpenedBundle:
    """Read and verify the bundle. Raises EngineError where it is not served here, and says why."""
    bundle = settings.bundle
    manifest = Manifest.read(bundle)
    files = manifest.hold(bundle)
    backends = candidate_backends(settings, manifest)
    for backend in backends:
        check_pools_fit(manifest, backend)
        if not settings.compile:
            check_fits(manifest, backend, bundle)
    files.verify(later=_read_whole(manifest, backends, bundle))
    return OpenedBundle(manifest, backends, ServedFiles(bundle, files))


def _read_whole(manifest: Manifest, backends: Sequence[str], bundle: Path) -> set[Path]:
    """Files that are hashed when they are read, and not twice: TensorRT's engines, if only they can be served."""
    (backend, *others) = backends
    if others or backend not in TENSORRT or backend not in manifest.builds:
        return set()
    return files_of(manifest, backend, bundle)


class ServedFiles:
    """Gives out what was hashed, and notices when a file that stays mapped no longer is that."""

    def __init__(self, bundle: Path, files: HeldFiles, *, every: float = _EVERY) -> None:
        """`files` of `bundle` that stay mapped are looked at `every` so many seconds."""
        self._bundle = bundle
        self._files = files
        self._every = every

    def read(self, path: Path) -> bytes:
        """The contents of a file of the bundle, which have its hash. Raises BundleError."""
        return self._files.read(path)

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
            threading.Thread(target=self._watch, args=(on_change,), name="files", daemon=True).start()
        else:  # GPUs have a copy of the weights
            self._files.close()

    def _watch(self, on_change: Callable[[BundleError], None]) -> None:
        while True:
            time.sleep(self._every)
            try:
                self._files.check_contents()
            except BundleError as error:
                on_change(error)
                return
