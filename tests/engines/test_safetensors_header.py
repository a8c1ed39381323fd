"""Headers give shapes and metadata; files that are damaged, missing or unreadable are reported with what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engines.errors import CheckpointError
from engines.safetensors_header import read_header
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


def written(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(*offsets: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape or [2], "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty: download it again"),
        (b"abc", r"is not a \.safetensors file, or is damaged \(header too small\): download it again"),
        (b"PK\x03\x04 a zip file, as pickles are", r"is a pickle .* its own suffix, \.ckpt, or convert it"),
        (b"\x80\x02}q\x00" + bytes(40), "is a pickle by another name"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS, .* run `git lfs pull`"),
        (b"\n<!DOCTYPE html><html>", "is a web page, not weights"),
        (b"GGUF" + bytes(40), "is a GGUF file"),
        (b"\x08\0\0\0\0\0\0\0not json", "damaged .invalid JSON in header"),
        (HUGE, r"is incomplete \(10 bytes, and its header alone has 1,099,511,627,784\): download it again"),
        (bytes([255] * 80), "damaged .header too large"),
        (
            written({"a": tensor(0, 8), "b": tensor(8, 4_000_000_008)}, bytes(40)),
            r"incomplete \(\d+ of 4,000,000,\d+ b",
        ),
        (written({"a": tensor(0, 8)}, bytes(8))[:20], "is incomplete .* header alone has .*: download it again"),
        (written({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)), "damaged .invalid offset for tensor `b`"),
        (written({"a": tensor(0, 8, dtype="F7")}, bytes(8)), "damaged .invalid JSON in header: unknown variant `F7`"),
        (written({"a": tensor(0, 8)}, bytes(20)), "damaged .incomplete metadata, file not fully covered"),
        (written({"a": tensor(0, 8, shape=[3])}, bytes(8)), "damaged .invalid shape, data type, or offset"),
        (written({"a": tensor(0, 8, shape=[2**40, 2**40])}, bytes(8)), "damaged .overflow"),
        (written([1], b""), "damaged .invalid JSON"),
        (written({"a": {"dtype": "F32"}}, b""), "damaged .invalid JSON"),
        (written(b'{"a":' * 5000, b""), "damaged .invalid JSON in header: recursion limit"),
    ],
)
def test_damaged_files_are_refused_in_one_line(path: Path, content: bytes, complaint: str) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint) as raised:
        read_header(path)
    (line,) = str(raised.value).splitlines()
    assert line.startswith(str(path))
    assert len(line) < len(str(path)) + 250


def test_a_header_beyond_the_bound_is_refused(path: Path) -> None:
    with path.open("wb") as file:
        file.write((101 * 2**20).to_bytes(8, "little") + b"{")
        file.truncate(102 * 2**20)
    with pytest.raises(CheckpointError, match=r"damaged .header too large"):
        read_header(path)


def test_truncated_weights_are_refused(path: Path) -> None:
    save_file({"a": torch.zeros(8)}, path)
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"is incomplete \({whole - 1} of {whole} bytes\): download it again"):
        read_header(path)


def test_a_pipe_is_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="cannot be read: it is not a file"):
        read_header(path)


def test_missing_and_unreadable_files_are_refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist: check the path"):
        read_header(path)
    path.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(path)


def test_headers_are_read_without_torch(path: Path) -> None:
    save_file({"a": torch.zeros(8)}, path)
    code = (
        "import sys; from pathlib import Path; from engines.safetensors_header import read_header;"
        "read_header(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=True)  # noqa: S603 - our own
