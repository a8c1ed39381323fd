"""CUDA statuses as exceptions."""

from __future__ import annotations

from typing import Any

from engines.errors import DeviceLost, EngineError

try:
    from cuda.bindings import runtime
except ImportError:  # an optional dependency: `probe` names the extra that installs it
    runtime = None

__all__ = ["LOST", "MEMORY_IS_FULL", "check", "is_complete", "runtime"]

MEMORY_IS_FULL = (
    "Build with fewer --rows, a smaller --resolution or --decode-batch, or stop other programs that use the GPU."
)
_REMEDIES = {
    "cudaErrorMemoryAllocation": f"If the GPU's memory is full: {MEMORY_IS_FULL}",
    "cudaErrorInsufficientDriver": "The NVIDIA driver is missing, or older than this CUDA: install a new one.",
    "cudaErrorNoDevice": "The NVIDIA driver finds no GPU: see nvidia-smi, and CUDA_VISIBLE_DEVICES.",
}

# After any of these, every further CUDA call of the process fails.
LOST = {
    # A kernel broke the process's context. CUDA's reference of each: "leaves the process in an inconsistent state and
    # any further CUDA work will return the same error", or "the device cannot be used again".
    "cudaErrorIllegalAddress",
    "cudaErrorLaunchTimeout",
    "cudaErrorAssert",
    "cudaErrorHardwareStackError",
    "cudaErrorIllegalInstruction",
    "cudaErrorMisalignedAddress",
    "cudaErrorInvalidAddressSpace",
    "cudaErrorInvalidPc",
    "cudaErrorLaunchFailure",
    "cudaErrorTensorMemoryLeak",
    # The hardware failed, or another device that the GPU was waiting for.
    "cudaErrorECCUncorrectable",
    "cudaErrorNvlinkUncorrectable",
    "cudaErrorContained",
    "cudaErrorExternalDevice",
    # The GPU, its context or the service in front of it ended. A GPU that fell off the bus returns unknown.
    "cudaErrorDevicesUnavailable",
    "cudaErrorDeviceUninitialized",
    "cudaErrorContextIsDestroyed",
    "cudaErrorMpsConnectionFailed",
    "cudaErrorMpsRpcFailure",
    "cudaErrorMpsServerNotReady",
    "cudaErrorMpsClientTerminated",
    "cudaErrorUnknown",
}


def check(result: tuple[Any, ...]) -> Any:
    """The values that a call of cuda.bindings returned after its status: one value as it is, several as a tuple.

    Raises:
        DeviceLost: the status is one that every later call returns as well.
        EngineError: the call failed in another way.
    """
    status, *values = result
    if int(status):
        remedy = _REMEDIES.get(status.name, "See nvidia-smi and the kernel's log, then restart.")
        text = runtime.cudaGetErrorString(status)[1].decode()
        kind = DeviceLost if status.name in LOST else EngineError
        raise kind(f"CUDA error {int(status)}, {text}. {remedy}")
    return values[0] if len(values) == 1 else tuple(values)


def is_complete(calls: Any, result: tuple[Any, ...]) -> bool:
    """Whether a query of `calls` found the work complete. Raises DeviceLost, and EngineError if the work failed."""
    if result[0].name == "cudaErrorNotReady":
        calls.cudaGetLastError()  # a query leaves its answer there, where libraries look for errors of their own
        return False
    check(result)
    return True
