"""The models by the web UI's names: a title with the first digits of a hash."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from engines.manifest import Manifest
from server.api.sdapi.translation.checkpoint import checkpoint_of, find_checkpoint
from server.runtime.models import Model

FILE = "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa"


def model(manifest: Manifest, file_sha256: str | None) -> Model:
    source = manifest.source.model_copy(update={"file_sha256": file_sha256})
    named = SimpleNamespace(name="mine", manifest=manifest.model_copy(update={"source": source}))
    return cast("Model", named)  # of which only these are read


@pytest.mark.parametrize("file_sha256", [FILE, None], ids=["a file", "a folder"])
def test_the_hash_is_that_of_the_file_where_there_is_one(manifest: Manifest, file_sha256: str | None) -> None:
    mine = model(manifest, file_sha256)
    wanted = file_sha256 or manifest.source.sha256
    assert checkpoint_of(mine).title == f"mine [{wanted[:10]}]"
    for name in (f"mine [{wanted[:10]}]", wanted, wanted[:10].upper(), "mine", "mine.safetensors"):
        assert find_checkpoint([mine], name, field="sd_model_checkpoint") is mine
