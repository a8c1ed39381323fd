"""What NVML tells of the GPU that this process uses, read at every scrape and never in between."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib import import_module
from threading import Lock
from typing import Any
from uuid import UUID

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

_log = logging.getLogger(__name__)

Reading = Mapping[tuple[str, ...], float]  # by label values


class GpuMetrics(Collector):
    """Gauges of one GPU or MIG instance. Without NVML there are none; a failed reading leaves out its gauge."""

    def __init__(self, uuid: UUID, nvml: Any = None) -> None:
        """`nvml` stands for the module `pynvml`."""
        self._uuid = uuid
        self._given = nvml
        self._lock = Lock()  # of concurrent scrapes
        self._told: set[str] = set()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        with self._lock:
            if self._handle is not None:
                yield from (family for family, read in self._gauges() if self._fill(family, read))

    @cached_property
    def _nvml(self) -> Any:
        return self._given or import_module("pynvml")

    @cached_property
    def _handle(self) -> Any:
        """NVML's handle of the GPU, or None if it cannot be had."""
        try:
            self._nvml.nvmlInit()
            return self._find()
        except ImportError:
            _log.info("no metrics of the GPU: nvidia-ml-py is not installed")
        except self._nvml.NVMLError as error:
            _log.warning("no metrics of the GPU: %s", str(error))
        return None

    def _find(self) -> Any:
        try:
            return self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{self._uuid}")
        except self._nvml.NVMLError:  # no whole GPU has it
            return self._nvml.nvmlDeviceGetHandleByUUID(f"MIG-{self._uuid}")

    def _gauges(self) -> tuple[tuple[GaugeMetricFamily, Callable[[], Reading]], ...]:
        """Each gauge, still empty, and what reads it."""
        return (
            (
                GaugeMetricFamily("latentd_gpu_memory_bytes", "Memory of the GPU, of all processes.", labels=["kind"]),
                self._memory,
            ),
            (
                GaugeMetricFamily("latentd_gpu_utilization_ratio", "Share of the last second that had a kernel."),
                self._utilization,
            ),
            (GaugeMetricFamily("latentd_gpu_power_watts", "Power that the GPU draws."), self._power),
            (GaugeMetricFamily("latentd_gpu_temperature_celsius", "Temperature of the GPU."), self._temperature),
        )

    def _fill(self, family: GaugeMetricFamily, read: Callable[[], Reading]) -> bool:
        """Returns whether the gauge could be read."""
        try:
            for labels, value in read().items():
                family.add_metric(labels, value)
        except self._nvml.NVMLError as error:  # MIG instances have no utilization, for one
            if family.name not in self._told:
                self._told.add(family.name)
                _log.warning("%s is missing at /metrics: %s", family.name, str(error))
            return False
        return True

    def _memory(self) -> Reading:
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        return {("used",): memory.used, ("total",): memory.total}

    def _utilization(self) -> Reading:
        return {(): self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100}

    def _power(self) -> Reading:
        return {(): self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000}

    def _temperature(self) -> Reading:
        return {(): self._nvml.nvmlDeviceGetTemperature(self._handle, self._nvml.NVML_TEMPERATURE_GPU)}
