"""Where CUDA's libraries are found. That ONNX Runtime finds them there: tests/stub_cuda."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cuda.bindings import runtime
from cuda.pathfinder import load_nvidia_dynamic_lib

from engines.backends.cuda import Library, load_libraries
from engines.errors import EngineError

# No installed library has this soname, so only its file is found.
OURS = Library("libours.so.7", "cudart")
ABSENT = Library("libabsent.so.7", "cudart")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library in a folder of `sys.path`, laid out as a wheel of CUDA 13 is."""
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    return folder / OURS.soname


def test_a_wheel_in_any_folder_of_the_path_is_found(wheel: Path) -> None:
    shutil.copy(runtime.__file__, wheel)  # any library that the linker opens
    load_libraries([OURS], needed_by="the test")
    assert str(wheel) in Path("/proc/self/maps").read_text()


def test_what_is_missing_is_named_with_the_command(wheel: Path) -> None:
    wheel.write_bytes(b"no library")
    with pytest.raises(EngineError, match=r"^the test needs libours\.so\.7, libabsent\.so\.7, in no .*\[cuda\]"):
        load_libraries([OURS, ABSENT], needed_by="the test")


def test_a_library_of_another_name_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda-pathfinder takes CUDA 12 where there is no CUDA 13."""
    monkeypatch.setattr("cuda.pathfinder.load_nvidia_dynamic_lib", lambda _name: None)
    with pytest.raises(EngineError, match=r"libabsent\.so\.7"):
        load_libraries([ABSENT], needed_by="the test")


def test_the_finder_raises_what_is_expected_of_it() -> None:
    with pytest.raises(RuntimeError):
        load_nvidia_dynamic_lib("no such library")
