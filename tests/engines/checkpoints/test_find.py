"""Checkpoints are found in folders and files, and their weights are checked before they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.checkpoints.find import find_checkpoint
from engines.errors import CheckpointError
from tests.support.checkpoints import Families


def test_paths_without_a_checkpoint_are_explained(tmp_path: Path, families: Families) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(str(tmp_path / "model.safetensors"))
    (tmp_path / "model.onnx").touch()
    with pytest.raises(CheckpointError, match="not a checkpoint: pass a diffusers folder"):
        find_checkpoint(str(tmp_path / "model.onnx"))
    with pytest.raises(CheckpointError, match="--config describes a single file"):
        find_checkpoint(str(families("sd1")), config=str(families("sd1")))
    with pytest.raises(CheckpointError, match="does not exist: check the path, or pass a hub id"):
        find_checkpoint(str(tmp_path / "no such folder"))
