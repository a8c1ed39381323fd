"""Files that are mapped give their memory back, and keep what they say."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

import engines.demo
from engines.mapped import let_go
from tests.loaded import Loaded

DEMO = Path(engines.demo.__file__).parent
PAGES = 64

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems keep no such accounts")


def held(folder: Path) -> int:
    """Bytes of memory that files in `folder` take here."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first, *rest = line.split(maxsplit=5)
        if "-" in first:
            inside = len(rest) == 5 and Path(rest[4]).is_relative_to(folder.resolve())
        elif inside and first == "Rss:":
            found += int(rest[0]) * 1024
    return found


def mapped(path: Path) -> mmap.mmap:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"latent" * (PAGES * mmap.PAGESIZE // 6))
    with path.open("rb") as file:
        opened = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert opened[:].startswith(b"latent")  # and every page is here
    return opened


def test_a_folders_files_are_let_go_and_say_the_same(tmp_path: Path) -> None:
    one, other = mapped(tmp_path / "an engine" / "weights"), mapped(tmp_path / "other" / "weights")
    before = one[:]
    assert held(tmp_path / "an engine") >= (PAGES - 1) * mmap.PAGESIZE
    let_go(tmp_path / "an engine")
    assert held(tmp_path / "an engine") == 0
    assert held(tmp_path / "other") >= (PAGES - 1) * mmap.PAGESIZE
    assert one[:] == before
    other.close()


def test_an_engine_holds_no_file_once_it_is_loaded_nor_once_it_has_run() -> None:
    encode = Loaded("openvino", DEMO / "onnx" / "encode_prompt.onnx")
    assert held(DEMO / "onnx") < 1e5
    ids = np.zeros((1, 32), np.int64)
    inputs = {"ids": ids, "layer": np.full(1, 2), "weights": np.ones(ids.shape, np.float32)}
    encode(inputs, {"embeddings": np.empty((1, 32, 128), np.float32)})
    assert held(DEMO / "onnx") < 1e5
