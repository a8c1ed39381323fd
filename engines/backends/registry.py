"""The description of every backend. To add one, write a module with `open_device` and add an entry to `_SPECS`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from engines.backends.device import Device
from engines.errors import EngineError
from engines.manifest import Precision


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """What is known of a backend without importing its package."""

    name: str
    module: str  # with `open_device(*, threads: int) -> Device`; imported when a device is opened
    extra: str  # the optional dependency of this project that installs the package
    packages: tuple[str, ...]  # distributions of which any provides it; messages name the first
    precisions: tuple[Precision, ...]  # of its engines; the first is the default
    runs_on: Literal["cpu", "gpu"]  # CPU backends load the FP32 graphs of every bundle, GPU ones need a build
    compiles: bool = False  # whether its engines are compiled by TensorRT; others load ONNX graphs
    oldest: str = ""  # the first release that computes right, such as "1.31"; older ones are refused
    wrong_before: str = ""  # what is wrong in older ones


_SPECS = (  # the fastest first
    BackendSpec(
        name="tensorrt",
        module="engines.backends.tensorrt.device",
        extra="cuda",
        packages=("tensorrt",),
        precisions=("fp16", "bf16", "fp32", "fp8", "int8"),
        runs_on="gpu",
        compiles=True,
    ),
    BackendSpec(
        name="tensorrt_rtx",
        module="engines.backends.tensorrt.rtx",
        extra="rtx",
        packages=("tensorrt-rtx",),
        precisions=("fp16", "bf16", "fp32", "fp8", "int8"),
        runs_on="gpu",
        compiles=True,
    ),
    BackendSpec(
        name="onnxruntime_cuda",
        module="engines.backends.onnxruntime_cuda",
        extra="cuda",
        packages=("onnxruntime-gpu",),
        precisions=("fp16", "fp32"),
        runs_on="gpu",
        oldest="1.31",  # microsoft/onnxruntime#32120
        wrong_before="CUDA graphs copy from host memory that was freed",
    ),
    BackendSpec(
        name="openvino",
        module="engines.backends.openvino.device",
        extra="openvino",
        packages=("openvino",),
        precisions=("fp32", "bf16", "int8"),
        runs_on="cpu",
    ),
    BackendSpec(
        name="onnxruntime",
        module="engines.backends.onnxruntime",
        extra="cpu",
        packages=("onnxruntime", "onnxruntime-gpu"),
        precisions=("fp32",),
        runs_on="cpu",
    ),
)
SPECS: dict[str, BackendSpec] = {spec.name: spec for spec in _SPECS}
BACKENDS = tuple(SPECS)  # their names
ON_CPU = tuple(spec.name for spec in _SPECS if spec.runs_on == "cpu")
ON_GPU = tuple(spec.name for spec in _SPECS if spec.runs_on == "gpu")
TENSORRT = tuple(spec.name for spec in _SPECS if spec.compiles)
ONNXRUNTIME_CUDA = "onnxruntime_cuda"  # its graphs are rewritten for the operators of its own


def register(spec: BackendSpec) -> None:
    """Let `open_device` and the choice of backends use `spec`, in place of the backend of that name if there is one."""
    SPECS[spec.name] = spec


def open_device(backend: str, *, threads: int = 0) -> Device:
    """Open the device of `backend`, with `threads` CPU threads (0: one per core).

    Raises:
        EngineError: the name is unknown, or its package is not installed.
    """
    if backend not in SPECS:
        raise EngineError(f"Unknown backend {backend!r}: choose one of {', '.join(SPECS)}.")
    try:
        module = import_module(SPECS[backend].module)
    except ImportError as error:
        raise EngineError(missing_package(backend, str(error.name))) from error
    opener: Callable[..., Device] = module.open_device
    return opener(threads=threads)


def missing_package(backend: str, package: str) -> str:
    """The message for a backend whose package is not installed."""
    return f"Backend {backend} needs the package {package}: {install_command(SPECS[backend].extra)}"


def outdated(backend: str, version: str) -> str | None:
    """Why this `version` of the package behind `backend` is refused, in a few words; None if it is recent enough."""
    spec = SPECS[backend]
    if _numbers(version) >= _numbers(spec.oldest):
        return None
    return f"{spec.packages[0]} {version} is older than {spec.oldest}, before which {spec.wrong_before}"


def _numbers(version: str) -> list[int]:
    """The first two numbers of a version, which are those of a release of features."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def install_command(extra: str) -> str:
    """The command that installs an extra of this project: in a source checkout from there, with its pinned versions."""
    if _in_checkout():
        return f".venv/bin/pip install -c scripts/constraints.txt -e '.[{extra}]'"
    return f"pip install 'latentd[{extra}]'"


def build_command(*words: object) -> str:
    """The command that runs the build with these arguments, from a source checkout or from the installed package."""
    program = ".venv/bin/python build_engines.py" if _in_checkout() else "python -m build_engines"
    return f"{program} {shlex.join(map(str, words))}"


def _in_checkout() -> bool:
    return (Path(__file__).parents[2] / "pyproject.toml").is_file()
