"""The manifest of the tiny model with LoRA graphs."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.manifest import Manifest


@pytest.fixture(scope="session")
def lora_manifest(lora_bundle: Path) -> Manifest:
    """Pool of 4 x 8 ranks."""
    return Manifest.load(lora_bundle)
