"""Wheels cross in parts and arrive whole: a real wheel, installed by the real pip without an index."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import carry
from benchmarks.gpu.carry import CarryError, cut, install, missing, receive, requirements
from tests import ROOT

PINS = re.compile(r"^([\w.\-]+)==(\S+)", re.MULTILINE)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("wheels")
    return [wheel(folder, "first", 3000), wheel(folder, "second", 100), wheel(folder, "third", 5000)]


def wheel(folder: Path, name: str, size: int) -> Path:
    """A wheel with one module."""
    path, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", f"TEXT = '{'x' * size}'\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return path


def test_parts_that_cross_one_by_one_are_installed(wheels: list[Path], tmp_path: Path) -> None:
    parts = cut(wheels, tmp_path / "out", size=2048)
    assert [part.name for part in parts] == ["01", "02", "03", "04", "05"]
    there, kept = tmp_path / "there", tmp_path / "kept"
    for number, part in enumerate(parts, start=1):
        shutil.rmtree(there, ignore_errors=True)  # each copy replaces the one before
        shutil.copytree(part, there)
        assert receive(there, kept) == [part.name for part in parts[number:]]
    assert install(kept, tmp_path / "site") == [wheel.name for wheel in wheels]
    code = "import first, second, third; print(len(first.TEXT), len(second.TEXT), len(third.TEXT))"
    command = [sys.executable, "-c", code]
    ran = subprocess.run(  # noqa: S603 - our own
        command, env={"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["3000", "100", "5000"]


def test_cutting_again_gives_the_same_parts(wheels: list[Path], tmp_path: Path) -> None:
    first, again = (cut(wheels, tmp_path / name, size=3000) for name in ("a", "b"))
    assert [carry.sha256(part / f"{part.name}.part") for part in first] == [
        carry.sha256(part / f"{part.name}.part") for part in again
    ]


def test_what_is_damaged_missing_or_foreign_is_refused(wheels: list[Path], tmp_path: Path) -> None:
    first, second, *_ = cut(wheels, tmp_path / "out", size=2048)
    kept = tmp_path / "kept"
    receive(first, kept)
    with pytest.raises(CarryError, match="parts 02, 03, 04, 05 are missing"):
        install(kept, tmp_path / "site")
    part = second / "02.part"
    part.write_bytes(b"\0" + part.read_bytes()[1:])
    with pytest.raises(CarryError, match="damaged on its way"):
        receive(second, kept)
    (other, *_) = cut(wheels[:1], tmp_path / "other", size=2048)
    with pytest.raises(CarryError, match="is of other wheels"):
        receive(other, kept)
    with pytest.raises(CarryError, match="has no parts"):
        receive(tmp_path / "site", kept)
    assert carry.main(["install", str(kept), str(tmp_path / "site")]) == 1


def test_the_packages_to_carry_are_those_the_project_pins() -> None:
    pinned = {
        name.lower().replace("_", "-"): version
        for name, version in PINS.findall((ROOT / "scripts/constraints.txt").read_text(encoding="utf-8"))
    }
    for spec in requirements():
        name, _, version = spec.partition("==")
        assert version == pinned.get(name, version)
    assert {spec.partition("==")[0] for spec in requirements()} - pinned.keys() == {"onnxruntime-gpu"}


def test_what_is_missing_is_told() -> None:
    assert [spec.partition("==")[0] for spec in missing()] == ["onnxruntime-gpu"]


def test_it_needs_nothing_but_python() -> None:
    """As nothing else is there yet."""
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import benchmarks.gpu.carry",
    ]
    subprocess.run(command, check=True)  # noqa: S603 - our own


def test_a_part_and_the_working_tree_fit_into_one_copy() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)  # noqa: S607 - git
    if listed.returncode:
        pytest.skip("not a checkout")
    files = (ROOT / name.decode() for name in listed.stdout.split(b"\0") if name)
    assert sum(file.stat().st_size for file in files if file.is_file()) + carry.PART * 2**20 < 63 * 2**20
