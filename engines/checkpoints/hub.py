"""Downloads from the Hugging Face hub."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.errors import CheckpointError
from engines.progress import Progress, Stage

_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def check_hub_id(text: str) -> None:
    """Raise CheckpointError for a path, which no hub id looks like, and for what is neither."""
    if not _ID.fullmatch(text) or text.startswith(("./", "../", "~")):
        raise CheckpointError(
            f"{text} does not exist: check the path, or pass a hub id, which has the form owner/name."
        )


def is_offline() -> bool:
    """Return whether the hub client uses its cache alone, as HF_HUB_OFFLINE tells it."""
    from huggingface_hub import constants  # noqa: PLC0415 - local folders work without the hub client

    return bool(constants.HF_HUB_OFFLINE)


def list_files(model: str, commit: str) -> list[str]:
    """Return the paths of all files of a hub repository; none where the hub does not answer."""
    from huggingface_hub import HfApi  # noqa: PLC0415 - as above

    try:
        return list(HfApi().list_repo_files(model, revision=commit, token=_token()))
    except Exception:  # the list only makes a message more helpful
        return []


def download(model: str, patterns: Sequence[str], *, revision: str | None, progress: Progress) -> Path:
    """Download the files of hub repository `model` that match `patterns` to the hub's cache, and return their folder.

    Raises:
        CheckpointError: there is no such model or revision, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - local folders work without the hub client

    try:
        with progress.stage(f"{'looking up' if is_offline() else 'downloading'} {model}") as stage:
            folder = snapshot_download(
                model,
                revision=revision,
                allow_patterns=list(patterns),
                tqdm_class=_byte_counter(stage),
                token=_token(),
            )
    except Exception as error:  # the hub client raises many families: HTTP, DNS, offline mode, disk
        raise CheckpointError(_reason(model, revision, error)) from error
    return Path(folder)


def _reason(model: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import errors as hub  # noqa: PLC0415 - as above

    if is_offline():
        return (
            f"{model} is no folder here, and the hub's cache, to which HF_HUB_OFFLINE restricts the build, does not "
            "hold all files that are needed of it: unset HF_HUB_OFFLINE, or pass a folder that holds the checkpoint."
        )
    if isinstance(error, hub.HFValidationError):
        return f"{model!r} is neither a folder here nor a hub id such as owner/name."
    if isinstance(error, hub.RevisionNotFoundError):
        return f"{model} has no revision {revision!r}: check the name of the branch, tag or commit."
    if isinstance(error, hub.RepositoryNotFoundError):  # the base of GatedRepoError too
        return (
            f"{model} could not be downloaded: it is no folder here, and the hub has no such model, or you have no "
            "access to it. Check the name; for a private or gated model set HF_TOKEN in the environment."
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{model} could not be downloaded ({reason}): check the name and the network, or pass a folder that holds the "
        "checkpoint, which this is not, so that it was taken for a hub id."
    )


def _token() -> str | bool:
    return os.environ.get("HF_TOKEN") or False  # False: none, not even one saved on disk


def _byte_counter(stage: Stage) -> type:
    """Return a progress bar class that shows nothing and reports the bytes that the hub client writes to disk."""
    from huggingface_hub.utils import tqdm  # noqa: PLC0415 - as above

    lock = threading.Lock()  # files are downloaded by several threads

    class ByteCounter(tqdm):  # type: ignore[misc]  # the client ships no types
        def __init__(self, *args: Any, name: str = "", **options: Any) -> None:
            # The client makes a bar of files, one of bytes from the network (`….transfer`) and one of bytes on disk.
            self.counts = options.get("unit") == "B" and not name.endswith(".transfer")
            super().__init__(*args, **(options | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            with lock:
                self.n += n or 0
                if self.counts:
                    stage.update(self.n, self.total or self.n)

    return ByteCounter
