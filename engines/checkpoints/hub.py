"""Downloads from the Hugging Face hub."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.checkpoints.errors import CheckpointError
from engines.progress import Progress, Stage


def download(model: str, patterns: Sequence[str], *, revision: str | None, progress: Progress) -> Path:
    """Download the files of hub repository `model` that match `patterns` to the hub's cache, and return their folder.

    Raises:
        CheckpointError: there is no such model or revision, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - local folders work without the hub client

    try:
        with progress.stage(f"downloading {model}") as stage:
            folder = snapshot_download(
                model,
                revision=revision,
                allow_patterns=list(patterns),
                tqdm_class=_byte_counter(stage),
                token=os.environ.get("HF_TOKEN") or False,  # False: none, not even one saved on disk
            )
    except Exception as error:  # the hub client raises many families: HTTP, DNS, offline mode, disk
        raise CheckpointError(_reason(model, revision, error)) from error
    return Path(folder)


def _reason(model: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import errors as hub  # noqa: PLC0415 - as above

    if isinstance(error, hub.HFValidationError):
        return f"{model!r} is neither a folder here nor a hub id such as owner/name."
    if isinstance(error, hub.RevisionNotFoundError):
        return f"{model} has no revision {revision!r}: check the name of the branch, tag or commit."
    if isinstance(error, hub.RepositoryNotFoundError):  # the base of GatedRepoError too
        return (
            f"{model} could not be downloaded: the hub has no such model, or you have no access to it. Check the name; "
            "for a private or gated model set HF_TOKEN in the environment."
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{model} could not be downloaded ({reason}): check the name and the network, "
        "or pass a folder that holds the checkpoint."
    )


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
