"""The timing cache: reused from build to build, and never trusted further than TensorRT and the file's owner allow."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from engines.build.trt.parent import TIMING_CACHE, build_engine
from engines.build.trt.timings import Timings
from tests.engines.backends.tensorrt.test_names import signatures
from tests.engines.build.trt.block import rows
from tests.engines.build.trt.builds import RTX, Recorder, pretend
from tests.engines.build.trt.fake_builder import GPU, IBuilderConfig, ITimingCache

AS_TENSORRT = """
import tensorrt_rtx
from pathlib import Path
globals().update({name: value for name, value in vars(tensorrt_rtx).items() if not name.startswith("__")})
class Builder(tensorrt_rtx.Builder):
    def build_serialized_network(self, network, config):
        set_to = f"{config.builder_optimization_level} {config.tiling_optimization_level.name}"
        Path(__file__).with_suffix(".set").write_text(set_to)
        return super().build_serialized_network(network, config)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / TIMING_CACHE


def build(file: Path, *kernels: bytes) -> tuple[Timings, list[bytes], list[str]]:
    """The timings of a build that needs `kernels`, those of them that it measured, and its notes."""
    config, notes = IBuilderConfig(), list[str]()
    timings = Timings(config, str(file), note=notes.append)
    measured = config.build(kernels)
    timings.save()
    return timings, measured, notes


def test_a_build_measures_what_no_earlier_one_has(file: Path) -> None:
    assert build(file, b"a", b"b")[1:] == ([b"a", b"b"], [])
    timings, measured, notes = build(file, b"b", b"c")
    assert (timings.reused, measured, notes) == (2, [b"c"], [])
    assert build(file, b"a", b"b", b"c")[1] == []  # of both builds


def test_only_the_owner_can_read_and_write_the_file(file: Path) -> None:
    build(file, b"a")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("content", [b"another GPU\na", b"\0 damaged"])
def test_what_tensorrt_rejects_is_measured_again_and_replaced(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    file.chmod(0o600)
    timings, measured, notes = build(file, b"a")
    assert (timings.reused, measured) == (0, [b"a"])
    assert notes == [f"{file} is of another GPU or another version of TensorRT: all kernels are measured again."]
    assert file.read_bytes() == GPU + b"\na"


def test_a_file_that_others_can_write_is_not_read(file: Path) -> None:
    file.write_bytes(GPU + b"\na")
    file.chmod(0o666)
    _, measured, notes = build(file, b"a")
    assert measured == [b"a"]
    assert "can be written by others" in notes[0]


def test_a_link_is_not_followed(file: Path) -> None:
    target = file.with_name("elsewhere")
    target.write_bytes(GPU + b"\na")
    target.chmod(0o600)
    file.symlink_to(target)
    _, measured, (note,) = build(file, b"a", b"b")
    assert measured == [b"a", b"b"]
    assert "is not used" in note
    assert target.read_bytes() == GPU + b"\na"


def test_a_file_that_cannot_be_written_costs_the_next_build_its_time_and_nothing_else(tmp_path: Path) -> None:
    _, measured, (note,) = build(tmp_path / "nowhere" / TIMING_CACHE, b"a")
    assert measured == [b"a"]
    assert "the next build measures again: No such file or directory" in note


def test_timings_that_cannot_be_counted_are_reused_all_the_same(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: ITimingCache) -> list[bytes]:
        raise RuntimeError

    build(file, b"a")
    monkeypatch.setattr(ITimingCache, "queryKeys", fail)
    timings, measured, _ = build(file, b"a")
    assert (timings.reused, measured) == (None, [])


@pytest.mark.parametrize(
    ("owner", "member", "parameters"),
    [
        ("IBuilderConfig", "create_timing_cache", ("serialized_timing_cache",)),
        ("IBuilderConfig", "set_timing_cache", ("cache", "ignore_mismatch")),
        ("ITimingCache", "serialize", ()),
        ("ITimingCache", "queryKeys", ()),
    ],
)
def test_the_fake_takes_the_real_parameters(owner: str, member: str, parameters: tuple[str, ...]) -> None:
    assert parameters in signatures(owner, member)


@pytest.mark.parametrize(("level", "set_to"), [(0, "0 NONE"), (3, "3 NONE"), (4, "4 MODERATE"), (5, "5 FULL")], ids=str)
def test_the_level_and_the_cache_reach_tensorrt(
    graph: Path, file: Path, monkeypatch: pytest.MonkeyPatch, level: int, set_to: str
) -> None:
    """With the builder of TensorRT for RTX in the place of TensorRT's, which has the same names."""
    pretend(monkeypatch, file.parent, "tensorrt", AS_TENSORRT)
    out = file.with_name("it.engine")
    report = build_engine("tensorrt", graph, out, [rows(1)], optimization_level=level, progress=Recorder())
    assert report.reused_timings == 0
    assert out.stat().st_size > 1_000_000
    assert (file.parent / "tensorrt.set").read_text() == set_to
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_cache_that_the_real_builder_rejects_is_only_noted(
    graph: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, file.parent, "tensorrt", AS_TENSORRT)
    file.write_bytes(b"no timings" * 20)
    file.chmod(0o600)
    progress = Recorder()
    build_engine("tensorrt", graph, file.with_name("it.engine"), [rows(1)], optimization_level=3, progress=progress)
    assert any("timing cache" in note for note in progress.notes)
    assert file.read_bytes() != b"no timings" * 20


def test_rtx_has_no_timing_cache(graph: Path, file: Path) -> None:
    report = build_engine(RTX, graph, file.with_name("it.engine"), [rows(1)], progress=Recorder())
    assert report.reused_timings is None
    assert not file.exists()
