"""The cache of kernels that TensorRT for RTX compiles."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from engines.backends.tensorrt import rtx
from tests.engines.backends import fake_tensorrt as fake
from tests.engines.backends.tensorrt.tiny import Bench, inputs


def compiled(bench: Bench, rows: int = 2) -> int:
    """How many kernels a fresh engine compiles for one call."""
    buffers, _call = bench.bind(inputs(rows))
    engine = bench.device.load(bench.engine, bench.stream)
    call = engine.bind(buffers)
    for _ in range(3):
        call.launch()
    bench.stream.record().wait()
    bench.device.end_warm_up()
    return len(engine._engine._compiled)


@pytest.fixture
def cache(engine: Path) -> Path:
    return engine.with_name("tiny.engine.cache")


def test_what_was_compiled_is_kept_for_the_next_start(rtx_bench: Bench, cache: Path) -> None:
    assert compiled(rtx_bench) == 1
    assert cache.stat().st_mode & 0o777 == 0o600
    assert sorted(cache.parent.iterdir()) == [rtx_bench.engine, cache]
    assert compiled(rtx_bench) == 0
    assert compiled(rtx_bench, rows=3) == 1
    assert len(json.loads(cache.read_bytes())["kernels"]) == 2


def test_the_cache_is_written_only_when_something_was_added(rtx_bench: Bench, cache: Path) -> None:
    compiled(rtx_bench)
    before = cache.stat()
    compiled(rtx_bench)
    rtx_bench.device.end_warm_up()
    assert cache.stat().st_ino == before.st_ino
    cache.unlink()
    rtx_bench.device.end_warm_up()
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"", b"no cache", b'{"version": "1.6", "kernels": ["x"]}'], ids=str)
def test_a_cache_that_is_damaged_or_old_is_ignored_and_replaced(
    rtx_bench: Bench, cache: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_bytes(content)
    cache.chmod(0o600)
    assert compiled(rtx_bench) == 1
    assert f"{cache} is damaged, or of another GPU, driver or version" in caplog.text
    assert compiled(rtx_bench) == 0


@pytest.mark.parametrize(("mode", "why"), [(0o620, "written by others"), (0o602, "written by others")])
def test_a_cache_that_others_may_write_is_not_read(
    rtx_bench: Bench, cache: Path, mode: int, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    compiled(rtx_bench)
    cache.chmod(mode)
    assert compiled(rtx_bench) == 1
    assert "is ignored" in caplog.text
    assert why in caplog.text
    assert cache.stat().st_mode & 0o777 == 0o600, "its successor is ours alone"


def test_a_cache_of_another_user_is_not_read(
    rtx_bench: Bench, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled(rtx_bench)
    owner = cache.stat().st_uid
    if owner == 0:  # root's files are everybody's
        os.chown(cache, 4711, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert compiled(rtx_bench) == 1
    assert "belongs to another user" in caplog.text


def test_neither_links_nor_pipes_are_read(
    rtx_bench: Bench, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "elsewhere").write_bytes(b"{}")
    cache.symlink_to(tmp_path / "elsewhere")
    rtx_bench.bind(inputs(2))
    cache.unlink()
    os.mkfifo(cache)
    rtx_bench.bind(inputs(2))
    assert caplog.text.count("is ignored") == 2


def test_a_folder_that_cannot_be_written_is_a_warning(
    rtx_bench: Bench, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(cache.parent))

    monkeypatch.setattr("engines.files.temporary_for", refuse)
    assert compiled(rtx_bench) == 1
    assert (
        "compiled for tiny.engine cannot be saved, and are compiled again at the next start: [Errno 13]" in caplog.text
    )
    assert not cache.exists()


def test_a_write_that_breaks_off_leaves_the_old_cache(
    rtx_bench: Bench, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(rtx_bench)
    before = cache.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    compiled(rtx_bench, rows=3)
    assert cache.read_bytes() == before
    assert sorted(cache.parent.iterdir()) == [rtx_bench.engine, cache]


def test_a_package_that_refuses_the_cache_is_a_warning(
    rtx_bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fake.IRuntimeConfig, "set_runtime_cache", lambda *_: False)
    rtx_bench.bind(inputs(2))
    assert "accepts no cache for tiny.engine" in caplog.text


def test_kernels_are_compiled_before_they_are_captured(rtx_bench: Bench) -> None:
    engine = rtx_bench.device.load(rtx_bench.engine, rtx_bench.stream)
    contexts = engine._contexts
    assert isinstance(contexts, rtx.RtxContexts)
    config: fake.IRuntimeConfig = contexts._runtime_config
    assert config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    assert config.cuda_graph_strategy.name == "DISABLED"
