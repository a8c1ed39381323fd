"""A build on a full disk says so in one line, leaves nothing half written, and the bundle before it stays valid."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import build_engines
from engines.manifest import MANIFEST, Manifest
from tests import ROOT

DEMO = ROOT / "engines" / "demo"
MIB = 1 << 20


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:  # noqa: S603 - our own command
        pytest.skip("only a user who may mount file systems can fill one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)  # noqa: S603, S607 - our own command


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with disk(tmp_path / "disk", MIB) as folder:
        yield folder


@pytest.fixture
def demo_on_a_disk(tmp_path: Path) -> Iterator[Path]:
    """The demo bundle with room for 15 MiB more."""
    with disk(tmp_path / "disk", 40 * MIB) as folder:
        shutil.copytree(DEMO / "onnx", folder / "onnx")
        for name in (MANIFEST, "tokenizer.json"):
            shutil.copy(DEMO / name, folder)
        yield folder


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, *, but: int) -> None:
    """Leave `but` bytes."""
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - but)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a build."""
    assert build_engines.main(words) == 1
    said = "".join(capsys.readouterr())
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    return line


pytestmark = pytest.mark.faults


def test_engines_that_do_not_fit_leave_the_bundle_as_it_was(
    demo_on_a_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Manifest.load(demo_on_a_disk)
    fill(demo_on_a_disk, but=2 * MIB)
    words = ["compile", str(demo_on_a_disk), "--backend", "openvino", "--precision", "int8"]
    assert re.search("OpenVINO cannot write .*MB are free there: make room", refused(words, capsys))
    assert Manifest.load(demo_on_a_disk) == before
    assert not [name for name in files_in(demo_on_a_disk) if name.endswith(".tmp")]


def test_a_manifest_that_does_not_fit_leaves_the_bundle_as_it_was(
    demo_on_a_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Manifest.load(demo_on_a_disk)
    fill(demo_on_a_disk, but=8 << 10)  # less than a manifest
    assert "No space left on device" in refused(["compile", str(demo_on_a_disk), "--backend", "openvino"], capsys)
    assert Manifest.load(demo_on_a_disk) == before
    (demo_on_a_disk / "filler").unlink()
    assert build_engines.main(["compile", str(demo_on_a_disk), "--backend", "openvino"]) == 0
    assert "openvino" in Manifest.load(demo_on_a_disk).builds


def test_an_export_that_does_not_fit_leaves_no_bundle(
    checkpoint: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = small / "bundle"
    words = ["--model", str(checkpoint), "--out", str(out), "--backend", "onnxruntime", "--resolution", "32x32"]
    assert "No space left on device" in refused(words, capsys)
    assert MANIFEST not in files_in(out)
    assert not [name for name in files_in(out) if ".tmp" in name]
