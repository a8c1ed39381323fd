"""Why a library could not load a part of a checkpoint: the first weight that its config does not describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engines.checkpoints.loading.libraries import LOAD_ERRORS, first_sentence
from engines.safetensors_header import read_header

_WRAPPER = "text_model."  # transformers has removed it, and files still name it


def why_unloadable(kind: Any, folder: Path, error: Exception) -> str:
    """Return the file, tensor and shapes that do not fit the config in `folder`; else the library's first sentence.

    Raises:
        CheckpointError: a .safetensors file there is damaged.
    """
    described = _described(kind, folder)
    for path in sorted(folder.glob("*.safetensors")):
        for name, shape in read_header(path)[0].items():
            wanted = described.get(name, described.get(name.removeprefix(_WRAPPER)))
            if wanted not in (None, shape):
                return (
                    f"{path} holds {name} with the shape {list(shape)}, and its config.json describes {list(wanted)}. "
                    "Take both from the same checkpoint."
                )
    return first_sentence(error)


def _described(kind: Any, folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes that the config asks for; none where it cannot be read."""
    try:
        with torch.device("meta"):
            if hasattr(kind, "load_config"):  # diffusers
                module = kind.from_config(kind.load_config(folder, local_files_only=True))
            else:
                module = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
    except (*LOAD_ERRORS, TypeError):
        return {}
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
