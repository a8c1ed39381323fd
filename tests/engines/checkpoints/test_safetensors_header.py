"""Headers give shapes and metadata; files that are damaged, missing or unreadable are reported with what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engines.checkpoints.errors import CheckpointError
from engines.checkpoints.safetensors_header import read_header
from tests import ROOT

HUGE = (2**40).to_bytes(8, "little") + b"{}"  # the length of a header that no file has


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_shapes_are_in_the_order_of_the_data_and_metadata_is_read(path: Path) -> None:
    tensors = {"b": torch.zeros(2, 3), "a": torch.zeros(4, dtype=torch.bfloat16), "c": torch.zeros(())}
    save_file(tensors, path, metadata={"key": "value"})
    shapes, metadata = read_header(path)
    assert list(shapes.items()) == [("b", (2, 3)), ("c", ()), ("a", (4,))]  # the writer puts wider types first
    assert metadata == {"key": "value"}
    save_file(tensors, path)
    assert read_header(path) == (shapes, {})


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04 a zip file, as pickles are", b"\x08\0\0\0\0\0\0\0not json", HUGE],
    ids=["empty", "zip", "no-json", "huge"],
)
def test_damaged_files_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not a \.safetensors file, or is damaged .*: download it again"):
        read_header(path)


def test_truncated_weights_are_refused(path: Path) -> None:
    save_file({"a": torch.zeros(8)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        read_header(path)


def test_missing_and_unreadable_files_are_refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist: check the path"):
        read_header(path)
    path.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(path)


def test_a_missing_safetensors_package_is_explained(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match=r"needs the package safetensors: pip install 'latentd\[build\]'"):
        read_header(path)


def test_headers_are_read_without_torch(path: Path) -> None:
    save_file({"a": torch.zeros(8)}, path)
    code = (
        "import sys; from pathlib import Path; from engines.checkpoints.safetensors_header import read_header;"
        "read_header(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=True)  # noqa: S603 - our own
