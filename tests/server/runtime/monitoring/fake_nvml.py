"""The part of `pynvml` that the server uses, with a GPU of its own and one MIG instance."""

from __future__ import annotations

from types import SimpleNamespace
from uuid import UUID

GPU, INSTANCE = UUID(int=1), UUID(int=2)


class FakeNvml:
    """Named and called as `pynvml` is. Calls named in `failing` raise."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.failing: set[str] = set()
        self.calls: list[str] = []

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names, here and below
        self._enter("nvmlInit")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self._enter("nvmlDeviceGetHandleByUUID")
        if uuid not in {f"GPU-{GPU}", f"MIG-{INSTANCE}"}:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int | None = None) -> SimpleNamespace:  # noqa: N802, ARG002
        self._enter("nvmlDeviceGetMemoryInfo")
        return SimpleNamespace(total=8 * 2**30, used=3 * 2**30, free=5 * 2**30)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:  # noqa: N802
        self._enter("nvmlDeviceGetUtilizationRates")
        if handle.startswith("MIG"):
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(gpu=75, memory=10)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802, ARG002
        self._enter("nvmlDeviceGetPowerUsage")
        return 350_500  # mW

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:  # noqa: N802, ARG002
        self._enter("nvmlDeviceGetTemperature")
        return 61

    def _enter(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise self.NVMLError("GPU is lost")
