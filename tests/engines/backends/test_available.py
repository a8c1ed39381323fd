"""Which backend is taken, and that the reason is said."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from types import MappingProxyType

import pytest

from engines.backends import available
from engines.backends.cuda import Probe
from engines.backends.registry import install_command
from engines.errors import EngineError
from engines.manifest import Gpu

GPU = Probe(Gpu(name="NVIDIA L4", compute_capability="8.9"))
HOPPER = Probe(Gpu(name="NVIDIA H200", compute_capability="9.0"))
NONE = Probe(None, "no driver")


def here(
    monkeypatch: pytest.MonkeyPatch,
    *packages: str,
    gpu: Probe = NONE,
    versions: Mapping[str, str] = MappingProxyType({}),
) -> None:
    def version(package: str) -> str:
        if package in packages:
            return versions.get(package, "2.0")
        raise PackageNotFoundError(package)

    monkeypatch.setattr(available, "version", version)
    monkeypatch.setattr(available, "probe", lambda: gpu)


@pytest.mark.parametrize(
    ("packages", "gpu", "backend"),
    [
        (["onnxruntime"], NONE, "onnxruntime"),
        (["onnxruntime", "openvino"], NONE, "openvino"),
        (["onnxruntime", "tensorrt-rtx"], NONE, "onnxruntime"),
        (["onnxruntime", "tensorrt-rtx"], GPU, "tensorrt_rtx"),
        (["onnxruntime", "tensorrt-rtx"], HOPPER, "onnxruntime"),  # which RTX does not take
        (["onnxruntime-gpu", "tensorrt-rtx"], HOPPER, "onnxruntime_cuda"),
        (["onnxruntime-gpu"], NONE, "onnxruntime"),
        (["onnxruntime-gpu"], GPU, "onnxruntime_cuda"),
        (["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"], GPU, "tensorrt"),
    ],
)
def test_the_fastest_that_runs_here_is_taken(
    monkeypatch: pytest.MonkeyPatch, packages: list[str], gpu: Probe, backend: str
) -> None:
    here(monkeypatch, *packages, gpu=gpu)
    assert available.choose().backend == backend


def test_a_choice_has_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, "onnxruntime", "tensorrt-rtx")
    assert available.choose().reason == (
        "tensorrt: not installed; tensorrt_rtx: no driver; onnxruntime_cuda: not installed; "
        "openvino: not installed; onnxruntime: available"
    )


@pytest.mark.parametrize(("version", "backend"), [("1.30.0", "onnxruntime"), ("1.31.0.dev1", "onnxruntime_cuda")])
def test_an_onnx_runtime_that_computes_wrong_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, version: str, backend: str
) -> None:
    here(monkeypatch, "onnxruntime-gpu", gpu=GPU, versions={"onnxruntime-gpu": version})
    choice = available.choose()
    assert choice.backend == backend
    refusal = (
        "onnxruntime_cuda: onnxruntime-gpu 1.30.0 is older than 1.31, before which CUDA graphs copy from host memory "
        "that was freed;"
    )
    assert (refusal in choice.reason) == (backend == "onnxruntime")


def test_the_error_without_any_backend_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)
    with pytest.raises(EngineError, match=re.escape(install_command("cpu"))):
        available.choose()
    with pytest.raises(
        EngineError, match=f"openvino needs the package openvino: {re.escape(install_command('openvino'))}"
    ):
        available.installed("openvino")


def test_tensorrt_compiles_on_the_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, "tensorrt")
    with pytest.raises(EngineError, match=r"no driver.*--backend tensorrt_rtx"):
        available.gpu_here()
