"""Tiny checkpoints of every family."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engines.checkpoints.find import find_checkpoint
from engines.checkpoints.loading.modules import Modules
from tests.support.checkpoints import Families, load
from tests.support.tiny import make_checkpoint


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    """A checkpoint of each family, made when it is first asked for: copy what you alter."""
    root = tmp_path_factory.mktemp("families")

    def family(name: str) -> Path:
        return root / name if (root / name).exists() else make_checkpoint(root / name, name)

    return family


@pytest.fixture(scope="session")
def plain(families: Families) -> Modules:
    """The modules of `sd1`: leave them as they are."""
    return load(find_checkpoint(str(families("sd1"))))


@pytest.fixture
def copied(families: Families, tmp_path: Path) -> Path:
    return Path(shutil.copytree(families("sd1"), tmp_path / "copy"))


@pytest.fixture
def copied_xl(families: Families, tmp_path: Path) -> Path:
    """A copy of `xl`, which has two text encoders."""
    return Path(shutil.copytree(families("xl"), tmp_path / "copy"))
