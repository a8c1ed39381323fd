"""The machines that the executor's tests run on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import cast

import pytest

import build_engines
from engines.backends.onnxruntime import OnnxRuntimeDevice
from engines.backends.registry import open_device
from tests.engines.backends.fake_cuda import FakeCuda
from tests.engines.backends.fake_tensorrt import fake_device, write_bundle
from tests.support.gpus import on_a_gpu
from tests.support.machines import FakeMachine, Machine


@pytest.fixture(scope="session")
def fake_bundle(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with engines that `fake_tensorrt` takes for TensorRT's."""
    out = tmp_path_factory.mktemp("fake") / "bundle"
    write_bundle(bundle, out, rows=(2, 4), decode_batch=2)
    return out


@pytest.fixture(scope="session")
def fake_lora_bundle(lora_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the bundle whose graphs apply LoRAs."""
    out = tmp_path_factory.mktemp("fake-lora") / "bundle"
    write_bundle(lora_bundle, out, rows=(2, 4), decode_batch=2)
    return out


@pytest.fixture(scope="session")
def compiled(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle with engines of a backend, compiled on this machine's GPU."""

    @cache
    def compile_for(backend: str) -> Path:
        out = tmp_path_factory.mktemp(backend) / "bundle"
        shutil.copytree(bundle, out)
        assert build_engines.main(["compile", str(out), "--backend", backend]) == 0
        return out

    return compile_for


@pytest.fixture
def cpu(bundle: Path) -> Machine:
    return Machine(bundle, "onnxruntime", lambda: OnnxRuntimeDevice(threads=1))


@pytest.fixture
def gpu(fake_bundle: Path) -> Iterator[FakeMachine]:
    cuda = FakeCuda()
    yield FakeMachine(fake_bundle, "tensorrt", lambda: fake_device(cuda), cuda)
    assert not cuda.faults


@pytest.fixture(params=["cpu", "fake", *(on_a_gpu(backend) for backend in ("tensorrt", "tensorrt_rtx"))])
def machine(request: pytest.FixtureRequest) -> Machine:
    """Each kind of machine that is here."""
    if request.param == "cpu":
        return cast(Machine, request.getfixturevalue("cpu"))
    if request.param == "fake":
        return cast(Machine, request.getfixturevalue("gpu"))
    bundle = request.getfixturevalue("compiled")(request.param)
    return Machine(bundle, request.param, lambda: open_device(request.param))
