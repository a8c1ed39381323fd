"""Compiles the stub libraries, laid out as NVIDIA's wheels and its driver are."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent / "lib"
CUDART = Path("nvidia/cu13/lib/libcudart.so.13")
_LIBRARIES = {  # by file: the source. The first is what the others are linked to.
    CUDART: "cudart.c",
    Path("nvidia/cu13/lib/libcublas.so.13"): "cublas.c",
    Path("nvidia/cu13/lib/libcublasLt.so.13"): "cublaslt.c",
    Path("nvidia/cu13/lib/libcurand.so.10"): "empty.c",
    Path("nvidia/cu13/lib/libnvrtc.so.13"): "empty.c",
    Path("nvidia/cudnn/lib/libcudnn.so.9"): "cudnn.c",
    Path("driver/libcuda.so.1"): "cuda.c",
}
# ONNX Runtime asks for each symbol with the version that its library defines.
_VERSIONED = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13")


def compiler() -> str | None:
    """The C compiler of this machine."""
    return shutil.which("cc")


def compile_libraries(folder: Path) -> None:
    """Compile every stub library into `folder`, which takes about two seconds."""
    for path, source in _LIBRARIES.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        versions = folder / f"{file.name}.map"
        versions.write_text(f"{file.name} {{ global: *; }};\n")
        options = [f"-Wl,--version-script={versions}"] if file.name in _VERSIONED else []
        linked = [] if path == CUDART else [str(folder / CUDART)]
        command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-pthread", str(SOURCES / source), *linked]
        command += [f"-Wl,-soname,{file.name}", *options, "-o", str(file)]
        subprocess.run(command, check=True)  # noqa: S603 - our own command
