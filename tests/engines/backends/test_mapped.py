"""Files that are mapped give their memory back, and keep what they say."""

from __future__ import annotations

import mmap
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from engines.backends.mapped import release_pages
from engines.backends.openvino.package import openvino
from tests.support.loaded import Loaded

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
    release_pages(tmp_path / "an engine")
    assert held(tmp_path / "an engine") == 0
    assert held(tmp_path / "other") >= (PAGES - 1) * mmap.PAGESIZE
    assert one[:] == before
    other.close()


def test_an_engine_holds_no_file_once_it_is_loaded_nor_once_it_has_run(tmp_path: Path) -> None:
    """A linear layer with 4 MiB of weights."""
    ops = openvino.opset13
    x = ops.parameter([-1, 1024], np.float32, name="x")
    x.output(0).tensor.set_names({"x"})
    weights = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    product = ops.matmul(x, weights, transpose_a=False, transpose_b=True)
    product.output(0).tensor.set_names({"y"})
    openvino.save_model(openvino.Model([product], [x]), tmp_path / "linear.xml", compress_to_fp16=False)
    linear = Loaded("openvino", tmp_path / "linear.xml")
    assert held(tmp_path) == 0
    given = np.ones((2, 1024), np.float32)
    made = linear({"x": given}, {"y": np.empty_like(given)})["y"]
    assert held(tmp_path) == 0
    np.testing.assert_allclose(made, given @ weights.T, atol=1e-2)


@pytest.mark.parametrize("temporary", ["", "missing"], ids=["a file", "no file"])
def test_an_engine_holds_no_file_of_the_weights_that_it_has_made(
    temporary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A convolution behind upsampling, of 2 MiB of weights."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / temporary))
    ops = openvino.opset13
    x = ops.parameter([-1, 256, 4, 4], np.float32, name="x")
    x.output(0).tensor.set_names({"x"})
    doubled = ops.interpolate(
        x,
        np.array([2, 2], np.float32),
        "nearest",
        "scales",
        axes=np.array([2, 3]),
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    weights = np.full((256, 256, 3, 3), 1 / (9 * 256), np.float32)
    made = ops.convolution(doubled, weights, [1, 1], [1, 1], [1, 1], [1, 1])
    made.output(0).tensor.set_names({"y"})
    openvino.save_model(openvino.Model([made], [x]), tmp_path / "up.xml", compress_to_fp16=False)
    up = Loaded("openvino", tmp_path / "up.xml")
    assert held(tmp_path) == 0
    y = up({"x": np.ones((1, 256, 4, 4), np.float32)}, {"y": np.empty((1, 256, 8, 8), np.float32)})["y"]
    assert held(tmp_path) == 0
    np.testing.assert_allclose(y[:, :, 1:-1, 1:-1], 1, atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"up.xml", "up.bin"}
