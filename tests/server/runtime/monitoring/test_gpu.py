"""Metrics of the GPU: over a fake of NVML that is held to the real module's names, and over the real one."""

from __future__ import annotations

import ast
import ctypes
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pynvml
import pytest
from cuda.bindings import driver
from prometheus_client.parser import text_string_to_metric_families

from engines.backends.cuda import discovery, gpu_uuid
from engines.errors import EngineError
from server.runtime.monitoring import gpu
from server.runtime.monitoring.gpu import GpuMetrics
from server.runtime.monitoring.metrics import Metrics
from tests.server.runtime.monitoring.fake_nvml import GPU, INSTANCE, FakeNvml

SOURCE = Path(gpu.__file__).read_text(encoding="utf-8")


def scrape(metrics: Metrics) -> Mapping[tuple[str, ...], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name.removeprefix("latentd_gpu_"), *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
        if family.name.startswith("latentd_gpu")
    }


def watching(nvml: Any, uuid: UUID = GPU) -> Metrics:
    metrics = Metrics(max_rows=2)
    metrics.add_collector(GpuMetrics(uuid, nvml))
    return metrics


def test_gauges_are_read_at_a_scrape_and_only_then() -> None:
    nvml = FakeNvml()
    metrics = watching(nvml)
    assert nvml.calls == []
    assert scrape(metrics) == {
        ("memory_bytes", "used"): 3 * 2**30,
        ("memory_bytes", "total"): 8 * 2**30,
        ("utilization_ratio",): 0.75,
        ("power_watts",): 350.5,
        ("temperature_celsius",): 61,
    }
    scrape(metrics)
    assert [nvml.calls.count(name) for name in ("nvmlInit", "nvmlDeviceGetPowerUsage")] == [1, 2]


def test_a_mig_instance_has_what_it_can_tell(caplog: pytest.LogCaptureFixture) -> None:
    metrics = watching(FakeNvml(), INSTANCE)
    for _ in range(2):
        assert {name for name, *_ in scrape(metrics)} == {"memory_bytes", "power_watts", "temperature_celsius"}
    assert [record.message for record in caplog.records] == [
        "latentd_gpu_utilization_ratio is missing at /metrics: Not Supported"
    ]


def test_a_failing_call_drops_its_gauge_until_it_works_again(caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml()
    metrics = watching(nvml)
    nvml.failing = {"nvmlDeviceGetMemoryInfo"}
    assert ("memory_bytes", "used") not in scrape(metrics)
    assert scrape(metrics)["power_watts",] == 350.5
    nvml.failing = set()
    assert ("memory_bytes", "used") in scrape(metrics)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("failing", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_without_nvml_there_are_no_metrics_and_one_message(failing: str, caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml()
    nvml.failing = {failing}
    metrics = watching(nvml)
    assert not scrape(metrics)
    assert not scrape(metrics)
    assert [record.message for record in caplog.records] == ["no metrics of the GPU: GPU is lost"]


def test_without_the_package_there_are_no_metrics(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert not scrape(watching(None))
    assert [record.message for record in caplog.records] == ["no metrics of the GPU: nvidia-ml-py is not installed"]


def test_the_real_nvml_gives_metrics_or_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    """Without a driver its library is missing; with one, it has no GPU of this UUID."""
    assert not scrape(watching(None))
    (record,) = caplog.records
    assert record.message.startswith("no metrics of the GPU: ")


# --- held to the real modules


def test_what_is_called_of_nvml_is_there_and_takes_so_many() -> None:
    calls = {
        (node.func.attr, len(node.args))
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("nvml")
    }
    assert len(calls) == 6
    for name, arguments in calls:
        inspect.signature(getattr(pynvml, name)).bind(*[None] * arguments)


@pytest.mark.parametrize("name", [name for name in vars(FakeNvml) if name.startswith("nvml")])
def test_the_fake_takes_what_nvml_takes(name: str) -> None:
    faked, real = (list(inspect.signature(getattr(module, name)).parameters) for module in (FakeNvml, pynvml))
    assert [parameter for parameter in faked if parameter != "self"] == real


def test_the_fake_has_nvml_s_fields_and_constants() -> None:
    assert FakeNvml.NVML_TEMPERATURE_GPU == pynvml.NVML_TEMPERATURE_GPU
    assert issubclass(pynvml.NVMLError, Exception)
    for read, kind in (
        (FakeNvml().nvmlDeviceGetMemoryInfo("GPU"), pynvml.c_nvmlMemory_t),
        (FakeNvml().nvmlDeviceGetUtilizationRates("GPU"), pynvml.c_nvmlUtilization_t),
    ):
        assert issubclass(kind, ctypes.Structure)
        assert vars(read).keys() == {field for field, *_ in kind._fields_}


class FakeDriver:
    """The part of `cuda.bindings.driver` that names the GPU."""

    def __init__(self, status: driver.CUresult = driver.CUresult.CUDA_SUCCESS) -> None:
        self._status = status

    def cuInit(self, Flags: int) -> tuple[driver.CUresult]:  # noqa: N802, N803, ARG002 - CUDA's names
        return (self._status,)

    def cuDeviceGet(self, ordinal: int) -> tuple[driver.CUresult, int]:  # noqa: N802
        return self._status, ordinal

    def cuDeviceGetUuid(self, dev: int) -> tuple[driver.CUresult, SimpleNamespace]:  # noqa: N802, ARG002
        return self._status, SimpleNamespace(bytes=INSTANCE.bytes)


def test_the_gpu_is_named_by_the_driver() -> None:
    assert gpu_uuid(FakeDriver()) == INSTANCE


def test_a_driver_that_fails_is_an_error() -> None:
    with pytest.raises(EngineError, match="CUDA error 999"):
        gpu_uuid(FakeDriver(driver.CUresult.CUDA_ERROR_UNKNOWN))


@pytest.mark.parametrize("name", [name for name in vars(FakeDriver) if name.startswith("cu")])
def test_the_fake_driver_takes_what_the_real_one_takes(name: str) -> None:
    faked, real = (list(inspect.signature(getattr(owner, name)).parameters) for owner in (FakeDriver, driver))
    assert faked[1:] == real
    assert f"calls.{name}(" in Path(discovery.__file__).read_text(encoding="utf-8")
