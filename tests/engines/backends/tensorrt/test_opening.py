"""Opening TensorRT where the GPU, the driver or the package is missing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx

from engines.backends.cuda import Cuda, Probe
from engines.backends.registry import install_command
from engines.backends.tensorrt import device as tensorrt
from engines.backends.tensorrt import rtx
from engines.backends.tensorrt.device import TensorRtDevice, open_package
from engines.errors import EngineError
from tests.engines.backends.fake_cuda import FakeCuda
from tests.engines.backends.fake_tensorrt import FAKE_GPU
from tests.engines.backends.tensorrt.tiny import NO_GPU


@NO_GPU
def test_without_a_driver_a_real_engine_is_not_loaded_and_the_error_has_tensorrts_reason(rtx_engine: Path) -> None:
    device = TensorRtDevice(tensorrt_rtx, Cuda(FakeCuda()), gpu=FAKE_GPU)
    with pytest.raises(EngineError, match=r"failed to load .*tiny\.rtx: rebuild it .*cudaError 35"):
        device.load(rtx_engine, device.stream("steps"))


def test_the_real_runtime_loads_no_other_bytes(tmp_path: Path) -> None:
    (tmp_path / "broken.rtx").write_bytes(b"not an engine" * 100)
    device = TensorRtDevice(tensorrt_rtx, Cuda(FakeCuda()), gpu=FAKE_GPU)
    with pytest.raises(EngineError, match=r"failed to load .*broken\.rtx: rebuild it .*magicTag"):
        device.load(tmp_path / "broken.rtx", device.stream("steps"))


@NO_GPU
@pytest.mark.parametrize(("opener", "backend"), [(tensorrt, "tensorrt"), (rtx, "tensorrt_rtx")])
def test_without_a_gpu_the_backend_says_what_to_take(opener: Any, backend: str) -> None:
    with pytest.raises(EngineError, match=f"Backend {backend} needs an NVIDIA GPU.*use the backend onnxruntime"):
        opener.open_device(threads=0)


def test_without_the_package_the_backend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "probe", lambda: Probe(FAKE_GPU))
    with pytest.raises(
        EngineError, match=f"Backend no_such_trt needs its package .*{re.escape(install_command('cuda'))}"
    ):
        open_package("no_such_trt", extra="cuda")
