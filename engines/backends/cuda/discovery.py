"""Finding the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from engines.backends.cuda import status
from engines.backends.registry import install_command
from engines.manifest import Gpu

FIRST_GPU = 0  # CUDA_VISIBLE_DEVICES selects which of several this is


@dataclass(frozen=True, slots=True)
class Probe:
    """The GPU of this machine, or the reason why there is none, in whole sentences."""

    gpu: Gpu | None
    reason: str = ""


def probe() -> Probe:
    """Look for the first GPU, without claiming it. Never raises: a missing driver, GPU or package is a reason."""
    if status.runtime is None:
        return Probe(None, f"cuda-python is not installed: {install_command('cuda')}")
    try:
        status.check(status.runtime.cudaGetDeviceCount())
        return Probe(_describe_gpu(status.runtime))
    except Exception as error:  # cuda.bindings raises its own classes where it finds no library to call
        return Probe(None, str(error))


def _describe_gpu(calls: Any) -> Gpu:
    found = status.check(calls.cudaGetDeviceProperties(FIRST_GPU))
    return Gpu(name=found.name.split(b"\0")[0].decode(), compute_capability=f"{found.major}.{found.minor}")


def gpu_uuid(calls: Any = None) -> UUID:
    """The UUID of the first GPU as this process sees it; of its MIG instance, if it is one.

    `calls` stands for `cuda.bindings.driver`. Raises EngineError.
    """
    if calls is None:
        from cuda.bindings import driver  # noqa: PLC0415 - an optional dependency, and only servers ask

        calls = driver
    status.check(calls.cuInit(0))
    return UUID(bytes=status.check(calls.cuDeviceGetUuid(status.check(calls.cuDeviceGet(FIRST_GPU)))).bytes)
