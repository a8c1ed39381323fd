"""Which backends are installed and can run on this machine, and what each loads from a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from engines.backends import memory
from engines.backends.registry import BACKENDS, ON_CPU, SPECS, install_command, missing_package, outdated
from engines.backends.tensorrt.compatibility import check_fits as check_tensorrt_fits
from engines.backends.tensorrt.compatibility import supported_capabilities
from engines.contract import GraphName
from engines.errors import EngineError
from engines.manifest import BundleError, Gpu, Manifest, Precision

if TYPE_CHECKING:
    from engines.backends.cuda import Probe


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen backend, and why those before it were not chosen."""

    backend: str
    reason: str


def installed(backend: str) -> str:
    """The version of the package behind `backend`. Raises EngineError if it is not installed."""
    for package in SPECS[backend].packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    raise EngineError(missing_package(backend, SPECS[backend].packages[0]))


def probe() -> Probe:
    """The GPU of this machine, or the reason why there is none."""
    from engines.backends.cuda import probe  # noqa: PLC0415 - a server on a CPU need not load CUDA

    return probe()


def unavailable_reason(backend: str) -> str | None:
    """Why `backend` cannot run on this machine, in a few words; None if it can."""
    try:
        refusal = outdated(backend, installed(backend))
    except EngineError:
        return "not installed"
    return refusal or (_gpu_unavailable_reason(backend) if SPECS[backend].runs_on == "gpu" else None)


def _gpu_unavailable_reason(backend: str) -> str | None:
    found = probe()
    if found.gpu is None:
        return found.reason
    supported = supported_capabilities(backend) if SPECS[backend].compiles else []
    if supported and found.gpu.compute_capability not in supported:
        return f"does not support {found.gpu.name} (compute capability {found.gpu.compute_capability})"
    return None


def gpu_here() -> Gpu:
    """The GPU that engines are compiled on and for. Raises EngineError if there is none."""
    found = probe()
    if found.gpu is None:
        raise EngineError(
            f"TensorRT compiles on the GPU that will run its engines. {found.reason} Compile there: "
            "build_engines.py compile BUNDLE needs no torch. Or use --backend tensorrt_rtx, which needs no GPU."
        )
    return found.gpu


def check_fits(manifest: Manifest, backend: str, bundle: Path) -> None:
    """Raise EngineError, with the command that rebuilds, if the engines were built for another GPU or version."""
    build = manifest.builds.get(backend)
    if build and SPECS[backend].compiles:
        check_tensorrt_fits(build, backend=backend, version=installed(backend), gpu=probe().gpu, bundle=bundle)


def engine_path(manifest: Manifest, backend: str, graph: GraphName) -> str:
    """The path of what `backend` loads for `graph`, relative to the manifest.

    CPU backends load the FP32 graphs if nothing was built for them.

    Raises:
        BundleError: the bundle holds no engines for a backend that needs them.
    """
    if backend in manifest.builds:
        return manifest.builds[backend].engines[graph].files[0].path
    if backend in ON_CPU:
        return manifest.graphs[graph].onnx["fp32"].files[0].path
    raise BundleError(f"{manifest.name} holds no engines for {backend}: build_engines.py compile makes them.")


def files_of(manifest: Manifest, backend: str, bundle: Path) -> set[Path]:
    """The paths of all files that `backend` loads from the bundle in folder `bundle`. Raises BundleError."""
    build = manifest.builds.get(backend)
    if build is None and backend not in ON_CPU:
        raise BundleError(f"{manifest.name} holds no engines for {backend}: build_engines.py compile makes them.")
    loaded = build.engines.values() if build else [graph.onnx["fp32"] for graph in manifest.graphs.values()]
    return {bundle / file.path for engine in loaded for file in engine.files}


def check_pools_fit(manifest: Manifest, backend: str) -> None:
    """Raise EngineError if the model's pools alone exceed the memory of this machine, before they are allocated.

    A GPU's memory is not looked at here: there, allocating them says so.
    """
    present = memory.limit()
    if backend in ON_CPU and manifest.pool_bytes > present:
        raise EngineError(
            f"{manifest.max_rows} rows at {len(manifest.resolutions)} sizes take {manifest.pool_bytes / 2**30:.0f} GiB "
            f"of memory, and this machine has {present / 2**30:.0f} GiB: "
            "build with fewer --rows or a smaller --resolution."
        )


def precision_of(manifest: Manifest, backend: str) -> Precision:
    """The precision that `backend` denoises in with this bundle."""
    return manifest.builds[backend].precision if backend in manifest.builds else "fp32"


def choose(backends: Sequence[str] = BACKENDS) -> Choice:
    """The first of `backends` that can run on this machine. Raises EngineError if none can."""
    unavailable: list[str] = []
    for backend in backends:
        reason = unavailable_reason(backend)
        if reason is None:
            return Choice(backend, "; ".join([*unavailable, f"{backend}: available"]))
        unavailable.append(f"{backend}: {reason}")
    raise EngineError(f"No backend is available ({'; '.join(unavailable)}): {install_command('cpu')}")
