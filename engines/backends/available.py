"""Which backends are installed here, which can run here, and which is the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from engines.backends.registry import BACKENDS, ON_CPU, needs
from engines.contract import GraphName
from engines.errors import EngineError
from engines.manifest import BundleError, Gpu, Manifest, Precision

if TYPE_CHECKING:
    from engines.backends.cuda import Probe

_PACKAGES = {
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx",),
    "onnxruntime_cuda": ("onnxruntime-gpu",),
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
}
TENSORRT = ("tensorrt", "tensorrt_rtx")
_ON_GPU = (*TENSORRT, "onnxruntime_cuda")


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend, and why it and none before it."""

    backend: str
    why: str


def installed(backend: str) -> str:
    """The version of the package behind `backend`. Raises EngineError where it is not installed."""
    for package in _PACKAGES[backend]:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    raise EngineError(needs(backend, _PACKAGES[backend][0]))


def probe() -> Probe:
    """The GPU that is here, or why there is none."""
    from engines.backends.cuda import probe  # noqa: PLC0415 - CUDA's modules, which a server on a CPU has no use for

    return probe()


def unavailable_reason(backend: str) -> str | None:
    """Why `backend` cannot run here, in a few words; None where it can."""
    try:
        installed(backend)
    except EngineError:
        return "not installed"
    return _gpu_unavailable_reason(backend) if backend in _ON_GPU else None


def _gpu_unavailable_reason(backend: str) -> str | None:
    found = probe()
    if found.gpu is None:
        return found.reason
    accepted = _accepted(backend) if backend in TENSORRT else []
    if accepted and found.gpu.compute_capability not in accepted:
        return f"not for {found.gpu.name}, of compute capability {found.gpu.compute_capability}"
    return None


def _accepted(backend: str) -> list[str]:
    from engines.backends.tensorrt import accepted_capabilities  # noqa: PLC0415 - as above

    return accepted_capabilities(backend)


def gpu_here() -> Gpu:
    """The GPU that engines would be compiled on and for. Raises EngineError where there is none."""
    found = probe()
    if found.gpu is None:
        raise EngineError(
            f"TensorRT compiles on the GPU that will run its engines. {found.reason} Compile there: "
            "build_engines.py compile BUNDLE needs no torch. Or take --backend tensorrt_rtx, which compiles anywhere."
        )
    return found.gpu


def check_fits(manifest: Manifest, backend: str, bundle: Path) -> None:
    """Raise EngineError, naming the command that rebuilds, where the engines were built for another GPU or version."""
    build = manifest.builds.get(backend)
    if build and backend in TENSORRT:
        from engines.backends import tensorrt  # noqa: PLC0415 - as above

        tensorrt.check_fits(build, backend=backend, version=installed(backend), gpu=probe().gpu, bundle=bundle)


def engine_path(manifest: Manifest, backend: str, graph: GraphName) -> str:
    """The path of what `backend` loads for `graph`, relative to the manifest.

    CPU backends load the FP32 graphs as they are where nothing was built for them.

    Raises:
        BundleError: the bundle holds no engines for a backend that needs them.
    """
    if backend in manifest.builds:
        return manifest.builds[backend].engines[graph].files[0].path
    if backend in ON_CPU:
        return manifest.graphs[graph].onnx["fp32"].files[0].path
    raise BundleError(f"{manifest.name} holds no engines for {backend}: build_engines.py compile makes them.")


def precision_of(manifest: Manifest, backend: str) -> Precision:
    """The precision that `backend` denoises in with this bundle."""
    return manifest.builds[backend].precision if backend in manifest.builds else "fp32"


def choose(backends: Sequence[str] = BACKENDS) -> Choice:
    """The first of `backends` that can run here. Raises EngineError where none can."""
    passed: list[str] = []
    for backend in backends:
        reason = unavailable_reason(backend)
        if reason is None:
            return Choice(backend, "; ".join([*passed, f"{backend}: runs here"]))
        passed.append(f"{backend}: {reason}")
    raise EngineError(f"No backend can run here ({'; '.join(passed)}): pip install 'latentd[cpu]'.")
