"""Engines that do not fit the GPU or the version are reported before loading."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engines.backends.tensorrt.compatibility import check_fits, check_fp8
from engines.errors import EngineError
from engines.manifest import Build, Compiled, File, Gpu


def build(version: str, gpu: Gpu | None) -> Build:
    return Build.model_construct(version=version, gpu=gpu, engines={})


L4 = Gpu(name="NVIDIA L4", compute_capability="8.9")


RTX_4090 = Gpu(name="NVIDIA GeForce RTX 4090", compute_capability="8.9")


A10 = Gpu(name="NVIDIA A10", compute_capability="8.6")


RTX_5090 = Gpu(name="NVIDIA GeForce RTX 5090", compute_capability="12.0")


H200 = Gpu(name="NVIDIA H200", compute_capability="9.0")


FITS = [
    ("tensorrt", "11.4.0.106", L4, "11.4.0.106", L4),
    ("tensorrt", "11.4.0.106", L4, "11.4.0.200", RTX_4090),
    ("tensorrt", "11.4.0.106", H200, "11.4.0.106", H200),
    ("tensorrt_rtx", "1.7.1.116", None, "1.7.1.116", A10),
    ("tensorrt_rtx", "1.7.1.116", None, "1.7.1.116", RTX_5090),
    ("tensorrt_rtx", "1.7.1.116", L4, "1.7.1.116", RTX_4090),
]


MISFITS = [
    (
        ("tensorrt", "11.4.0.106", L4, "11.3.1.2", A10),
        "The tensorrt engines in bundles/sd were built by TensorRT 11.4.0 for NVIDIA L4 (compute capability 8.9); "
        "this machine has TensorRT 11.3.1 and NVIDIA A10 (compute capability 8.6). "
        "Rebuild them on this machine: .venv/bin/python build_engines.py compile bundles/sd --backend tensorrt",
    ),
    (("tensorrt", "11.4.0.106", L4, "11.4.1.1", L4), "this machine has TensorRT 11.4.1 and NVIDIA L4"),
    (("tensorrt", "11.4.0.106", L4, "11.4.0.106", A10), "this machine has TensorRT 11.4.0 and NVIDIA A10"),
    (
        ("tensorrt_rtx", "1.6.0.9", None, "1.7.1.116", A10),
        "were built by TensorRT for RTX 1.6.0; "
        "this machine has TensorRT for RTX 1.7.1 and NVIDIA A10 (compute capability 8.6). "
        "Rebuild them on this machine: .venv/bin/python build_engines.py compile bundles/sd --backend tensorrt_rtx",
    ),
    (("tensorrt_rtx", "1.7.1.116", L4, "1.7.1.116", A10), "for NVIDIA L4 (compute capability 8.9); this machine has"),
    (
        ("tensorrt_rtx", "1.7.1.116", None, "1.7.1.116", H200),
        "TensorRT for RTX 1.7.1 supports compute capabilities 7.5, 8.0, 8.6, 8.9, 12.0, 12.1; "
        "this machine has NVIDIA H200 (compute capability 9.0). Build engines that run on it: "
        ".venv/bin/python build_engines.py compile bundles/sd --backend tensorrt",
    ),
    (("tensorrt", "11.4.0.106", L4, "11.4.0.106", None), "need an NVIDIA GPU, and this machine has none"),
]


Case = tuple[str, str, Gpu | None, str, Gpu | None]


def check_case(case: Case) -> None:
    backend, built_version, built_gpu, version, gpu = case
    check_fits(build(built_version, built_gpu), backend=backend, version=version, gpu=gpu, bundle=Path("bundles/sd"))


@pytest.mark.parametrize("case", FITS, ids=str)
def test_engines_that_fit_are_taken(case: Case) -> None:
    check_case(case)


@pytest.mark.parametrize(("case", "message"), MISFITS, ids=str)
def test_engines_that_do_not_fit_say_what_to_build(case: Case, message: str) -> None:
    with pytest.raises(EngineError, match=re.escape(message)):
        check_case(case)


@pytest.mark.parametrize("gpu", [L4, H200, RTX_5090], ids=str)
def test_ada_hopper_and_blackwell_compute_in_fp8(gpu: Gpu) -> None:
    check_fp8(gpu)


def test_a_gpu_without_fp8_is_told_the_precisions_that_it_has() -> None:
    file = File(path="engines/denoise.engine", size=0, sha256="0" * 64)
    engine = Compiled(files=(file,), precision="fp8", key="", seconds=0, memory=0)
    in_fp8 = build("1.7.1.116", None).model_copy(update={"engines": {"denoise": engine}})
    with pytest.raises(EngineError, match=r"NVIDIA A10 \(compute capability 8.6\) does not compute in FP8.*int8"):
        check_fits(in_fp8, backend="tensorrt_rtx", version="1.7.1.116", gpu=A10, bundle=Path("bundles/sd"))
    check_fits(in_fp8, backend="tensorrt_rtx", version="1.7.1.116", gpu=L4, bundle=Path("bundles/sd"))
