"""Whether TensorRT engines run on this machine, decided from the manifest before anything is loaded."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from engines.backends.registry import build_command
from engines.errors import EngineError
from engines.manifest import Build, Gpu

_FP8_FROM = (8, 9)  # the compute capability of Ada, the first with it


def check_fits(build: Build, *, backend: str, version: str, gpu: Gpu | None, bundle: Path) -> None:
    """Check that the engines of `build` run with `version` of the backend's package on `gpu`.

    Engines need the release that built them (its first three numbers). Those of TensorRT run on GPUs of the compute
    capability they were built on; those of TensorRT for RTX on every GPU that the package supports.

    Raises:
        EngineError: they do not run; says what was built, what this machine has, and the command that rebuilds.
    """
    if gpu is None:
        raise EngineError(
            f"The {backend} engines in {bundle} need an NVIDIA GPU, and this machine has none: "
            "use the backend onnxruntime or openvino."
        )
    supported = supported_capabilities(backend)
    if supported and gpu.compute_capability not in supported:
        raise EngineError(
            f"{title(backend)} {_release(version)} supports compute capabilities {', '.join(supported)}; "
            f"this machine has {_describe(gpu)}. Build engines that run on it: {_command(bundle, 'tensorrt')}"
        )
    if any(one.precision == "fp8" for one in build.engines.values()):
        check_fp8(gpu)
    same_gpu = build.gpu is None or build.gpu.compute_capability == gpu.compute_capability
    if not same_gpu or _release(build.version) != _release(version):
        built_for = f" for {_describe(build.gpu)}" if build.gpu else ""
        raise EngineError(
            f"The {backend} engines in {bundle} were built by {title(backend)} {_release(build.version)}{built_for}; "
            f"this machine has {title(backend)} {_release(version)} and {_describe(gpu)}. "
            f"Rebuild them on this machine: {_command(bundle, backend)}"
        )


def check_fp8(gpu: Gpu) -> None:
    """Raise EngineError unless `gpu` computes in FP8: Ada (8.9), Hopper (9.0) and Blackwell (10.x, 12.x) do."""
    if tuple(map(int, gpu.compute_capability.split("."))) < _FP8_FROM:
        raise EngineError(
            f"{_describe(gpu)} does not compute in FP8, which needs compute capability 8.9 or higher: "
            "compile with --precision int8, or fp16."
        )


def supported_capabilities(package: str) -> list[str]:
    """The compute capabilities that `package` lists, such as "8.9".

    Empty for a package that lists none (TensorRT, which builds for the GPU it runs on) or is not installed.
    """
    try:
        names = import_module(package).ComputeCapability.__members__
    except (ImportError, AttributeError):
        return []
    numbers = [name.removeprefix("SM") for name in names if name.startswith("SM")]  # SM89, SM120
    return [f"{number[:-1]}.{number[-1]}" for number in numbers]


def title(package: str) -> str:
    """The product's name."""
    return "TensorRT for RTX" if package.endswith("rtx") else "TensorRT"


def _release(version: str) -> str:
    return ".".join(version.split(".")[:3])


def _describe(gpu: Gpu) -> str:
    return f"{gpu.name} (compute capability {gpu.compute_capability})"


def _command(bundle: Path, backend: str) -> str:
    return build_command("compile", bundle, "--backend", backend)
