"""TensorRT. TensorRT for RTX runs the same code over the package `tensorrt_rtx`, which has every name used here."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any
from weakref import WeakSet

from engines.backends.cuda import (
    MEMORY_IS_FULL,
    Cuda,
    CudaDevice,
    CudaStream,
    as_cuda_stream,
    open_cuda,
    probe,
)
from engines.backends.device import Reader, Stream
from engines.backends.registry import install_command
from engines.backends.tensorrt.compatibility import title
from engines.backends.tensorrt.engine import Contexts, Scratch, TensorRtEngine
from engines.backends.tensorrt.log import logger_for
from engines.errors import EngineError
from engines.manifest import Gpu


class TensorRtDevice(CudaDevice):
    """The first GPU, with engines of TensorRT."""

    def __init__(self, trt: Any, cuda: Cuda, *, gpu: Gpu, contexts: type[Contexts] = Contexts) -> None:
        """`trt` is the module `tensorrt` or `tensorrt_rtx`. Raises EngineError if its runtime does not start."""
        super().__init__(cuda, name=f"{gpu.name}, {title(trt.__name__)} {trt.__version__}")
        self._trt = trt
        self._contexts = contexts
        self._scratch: dict[CudaStream, Scratch] = {}
        self._loaded: WeakSet[Contexts] = WeakSet()
        self._log = logger_for(trt)
        try:
            self._runtime = trt.Runtime(self._log)
        except (TypeError, RuntimeError) as error:  # pybind11's, if the C++ constructor returned null
            raise EngineError(
                f"TensorRT does not start: {self._log.take() or error}. Is the driver new enough?"
            ) from error

    def load(self, path: Path, stream: Stream, *, read: Reader = Path.read_bytes) -> TensorRtEngine:
        """Deserialise the engine at `path`. That runs code in the file, so check its hash first."""
        cuda_stream = as_cuda_stream(stream)
        free = self._cuda.free_memory()
        contexts = self._contexts(self._deserialise(path, read), path, trt=self._trt)
        self._loaded.add(contexts)
        # TensorRT allocates memory for weights by itself: the difference counts until the last call is garbage.
        self._cuda.track(contexts, f"{path.stem} weights", free - self._cuda.free_memory())
        scratch = self._scratch.setdefault(cuda_stream, Scratch(self._cuda))
        return TensorRtEngine(
            contexts,
            trt=self._trt,
            stream=cuda_stream,
            scratch=scratch,
            captured=self._captures.of(path),
            log=self._log,
        )

    def end_warm_up(self) -> None:
        super().end_warm_up()
        for contexts in self._loaded:
            contexts.end_warm_up()

    def _deserialise(self, path: Path, read: Reader) -> Any:
        try:
            content = read(path)
        except OSError as error:
            raise EngineError(f"{path} cannot be read: {error}") from error
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise EngineError(self._not_loaded(path, self._log.take()))
        return engine

    def _not_loaded(self, path: Path, errors: str) -> str:
        if "memory" in errors.lower():
            return f"{path} does not fit into the GPU's memory: {errors} {self._cuda.describe_usage()} {MEMORY_IS_FULL}"
        return f"TensorRT failed to load {path}: rebuild it on this machine, with this version. {errors}".rstrip()


def open_device(*, threads: int) -> TensorRtDevice:  # noqa: ARG001 - every backend is opened alike
    """Open the GPU through TensorRT. Raises EngineError if the GPU, its driver or the package is missing."""
    return open_package("tensorrt", extra="cuda")


def open_package(package: str, *, extra: str, contexts: type[Contexts] = Contexts) -> TensorRtDevice:
    """Open the GPU through `package`, which the optional dependency `extra` installs. Raises EngineError."""
    found = probe()
    if found.gpu is None:
        raise EngineError(
            f"Backend {package} needs an NVIDIA GPU. {found.reason} "
            "Without one, use the backend onnxruntime or openvino."
        )
    try:
        trt = import_module(package)
    except ImportError as error:
        raise EngineError(f"Backend {package} needs its package ({error}): {install_command(extra)}") from error
    cuda, gpu = open_cuda()
    return TensorRtDevice(trt, cuda, gpu=gpu, contexts=contexts)
