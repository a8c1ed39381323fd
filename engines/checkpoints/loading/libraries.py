"""What torch, diffusers and transformers have in common when they read files: errors, warnings and tensors."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engines.errors import CheckpointError

# What the libraries raise for files that are damaged, or do not fit their configs.
LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    AttributeError,
    NotImplementedError,
    ArithmeticError,
    AssertionError,
    IndexError,
    TypeError,
    SafetensorError,
    pickle.UnpicklingError,
)
_LOGGERS = ("torch.onnx", "onnx_ir", "transformers", "diffusers")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load a .safetensors file. Raises CheckpointError if it cannot be read."""
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error's message, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings about their own internals and their progress bars: the build shows its own."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    libraries = (transformers.logging, diffusers.logging)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        for library in libraries:
            library.disable_progress_bar()
        try:
            yield
        finally:
            for library in libraries:
                library.enable_progress_bar()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
