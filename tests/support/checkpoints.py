"""Checkpoints for tests to alter, and modules to compare."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.loading.convert import as_folder
from engines.checkpoints.loading.modules import Modules, load_modules
from engines.progress import NullProgress

PARTS = ("text_encoder", "unet", "vae")
Families = Callable[[str], Path]


class NoteRecorder(NullProgress):
    """Records the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickle_weights(folder: Path) -> None:
    """Turn the folder's safetensors into pickles, as older checkpoints have them."""
    for stem, pickled in (("model", "pytorch_model"), ("diffusion_pytorch_model", "diffusion_pytorch_model")):
        for path in folder.glob(f"*/{stem}.safetensors"):
            torch.save(load_file(path), path.with_name(f"{pickled}.bin"))
            path.unlink()


def load(checkpoint: Checkpoint) -> Modules:
    with as_folder(checkpoint, NullProgress()) as config:
        return load_modules(config, checkpoint)


def assert_same(modules: Modules, others: Modules) -> None:
    parts = (*PARTS, "text_encoder_2") if others.text_encoder_2 else PARTS
    for part in parts:
        here, there = getattr(modules, part).state_dict(), getattr(others, part).state_dict()
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)


class Harmful:
    """Runs code when it is unpickled without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)
