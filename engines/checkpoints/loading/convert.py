"""Convert a single-file checkpoint to a diffusers folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.diffusers_folder import PARTS, CheckpointConfig
from engines.checkpoints.errors import CheckpointError
from engines.checkpoints.loading.libraries import LOAD_ERRORS, first_sentence, quiet
from engines.checkpoints.single_file import SingleFileLayout, check_configs_fit, layout_of, read_layout
from engines.progress import Progress


@contextmanager
def as_folder(checkpoint: Checkpoint, progress: Progress) -> Iterator[CheckpointConfig]:
    """Give the checkpoint as a diffusers folder; that of a single file is temporary, and takes 4 GB for SD 1.x.

    Raises:
        CheckpointError: the single file cannot be read, is not supported, or its configs describe another.
    """
    if not checkpoint.single_file:
        yield checkpoint.config
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        with progress.stage(f"converting {checkpoint.path.name}"):
            _convert(checkpoint, Path(folder))
        yield CheckpointConfig(folder=Path(folder), name=checkpoint.name)


def _convert(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the single file as a diffusers folder, in FP32. What has no weights is copied from the configs."""
    pipeline, source = _load_pipeline(checkpoint), checkpoint.config.folder
    try:
        for part in ("tokenizer", "scheduler"):
            shutil.copytree(source / part, folder / part)
        shutil.copy(source / "model_index.json", folder)
        with quiet():
            for part in PARTS:
                getattr(pipeline, part).save_pretrained(folder / part)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint.path.name} cannot be converted: {error}. Set TMPDIR to choose another folder."
        ) from error


def _load_pipeline(checkpoint: Checkpoint) -> Any:
    """Load the file as a diffusers pipeline, and check that it holds all of its weights and no others."""
    pickled = checkpoint.path.suffix.lower() != ".safetensors"
    layout = _layout_of_pickle(checkpoint) if pickled else read_layout(checkpoint.path)
    try:
        with quiet():
            pipeline = _from_single_file(checkpoint)
    except LOAD_ERRORS as error:
        raise _misfit(checkpoint, _explain(error)) from error
    if layout.tensors != (expected := len(pipeline.unet.state_dict())):
        raise _misfit(checkpoint, f"its UNet has {layout.tensors} weights, not {expected}")
    return pipeline


def _from_single_file(checkpoint: Checkpoint) -> Any:
    from diffusers import StableDiffusionPipeline  # noqa: PLC0415 - warns of optional packages, so only when quiet

    return StableDiffusionPipeline.from_single_file(
        str(checkpoint.path),
        config=str(checkpoint.config_folder),
        local_files_only=True,
        torch_dtype=torch.float32,
        requires_safety_checker=False,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
    )


def _misfit(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path.name} is not what the configs in {checkpoint.config_folder} describe: {why}. "
        "Pass --config with a checkpoint of the same kind."
    )


def _explain(error: Exception) -> str:
    if isinstance(error, NotImplementedError):  # torch raises it for weights that were never loaded
        return "weights are missing"
    return first_sentence(error)


def _layout_of_pickle(checkpoint: Checkpoint) -> SingleFileLayout:
    """Recognise a pickled single file, as `find_checkpoint` recognises others by their header."""
    try:
        content = torch.load(checkpoint.path, map_location="meta", weights_only=True)
    except (*LOAD_ERRORS, EOFError) as error:
        raise CheckpointError(
            f"{checkpoint.path} cannot be read as plain tensors ({first_sentence(error)}): convert it to .safetensors "
            "where you trust it."
        ) from error
    content = content.get("state_dict", content)
    shapes = {name: tuple(value.shape) for name, value in content.items() if isinstance(value, Tensor)}
    layout = layout_of(checkpoint.path.name, shapes)
    check_configs_fit(checkpoint, layout)
    return layout
