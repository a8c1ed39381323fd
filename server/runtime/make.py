"""The one place that assembles a runtime: everything that runs requests, without HTTP."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple
from weakref import WeakMethod

from engines.backends.device import Device, Reader
from engines.backends.registry import ON_GPU
from engines.manifest import Manifest
from server.requests.intake import Intake
from server.requests.request import Request, StepCache
from server.requests.schemas import GenerateRequest
from server.requests.tokenizer import PromptTokenizer
from server.runtime.batcher import Batcher, Line
from server.runtime.decodes import DecodePriority
from server.runtime.executor import Executor
from server.runtime.monitoring.metrics import Metrics
from server.runtime.monitoring.trace import Trace
from server.runtime.pipeline import Pipeline
from server.runtime.safety import UNCHECKED, Safety
from server.runtime.step_times import StepTimeModel

_log = logging.getLogger(__name__)
_TEST_STEPS = 2

OnStatus = Callable[[str], None]  # called with what the runtime is doing, in a few words


class OpenedModel(NamedTuple):
    """A bundle with engines for a backend, and the device that loads them."""

    manifest: Manifest
    backend: str
    device: Device


class LoadedModel(NamedTuple):
    """A model whose engines are loaded."""

    manifest: Manifest
    backend: str
    pipeline: Pipeline


@dataclass(frozen=True, slots=True)
class Runtime:
    """The parts that run requests. `executor.start()` loads the model and begins."""

    intake: Intake
    batcher: Batcher
    executor: Executor
    metrics: Metrics
    step_times: StepTimeModel


def make_runtime(  # noqa: PLR0913 - the parts and options, all by keyword
    manifest: Manifest,
    bundle: Path,
    *,
    open_model: Callable[[OnStatus, Callable[[], bool]], OpenedModel],
    max_waiting: int,
    hang_factor: float,
    line: Callable[[], Line] = Line,
    trace: Trace | None = None,
    cache: StepCache = "off",
    decode_chunk: int | None = None,
    decode_priority: DecodePriority = "equal",
    safety: Safety = UNCHECKED,
    read: Reader = Path.read_bytes,
    on_loaded: Callable[[LoadedModel], None] = lambda _model: None,
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[Exception], None] = lambda _error: None,
) -> Runtime:
    """Assemble the runtime of the verified bundle in folder `bundle`. Nothing is loaded until the executor starts.

    Args:
        open_model: called in the executor's thread with a status callback and a function that says whether to stop.
        max_waiting: requests that may wait; see `Batcher`, as for `line`.
        hang_factor: see `Watchdog`.
        cache: the step cache of requests that do not set it; `disabled` does without its engine and its memory.
        decode_chunk: images decoded in one call; see `Pipeline`.
        decode_priority: how decodes share a GPU with steps.
        safety: whether images are checked, and what becomes of flagged ones.
        read: gives the contents of a file of the bundle.
        on_loaded, on_ready, on_failure: called in the executor's thread.
    """
    trace = trace or Trace()
    step_times = StepTimeModel(max_rows=manifest.max_rows)
    batcher = Batcher(
        max_rows=manifest.max_rows,
        max_waiting=max_waiting,
        work=step_times.work,
        seconds=step_times.seconds,
        line=line,
    )
    metrics = Metrics(max_rows=manifest.max_rows)

    def load(on_status: OnStatus) -> Pipeline:
        opened = open_model(on_status, lambda: batcher.closed)
        metrics.set_model(opened.manifest, opened.backend)
        metrics.watch_captures(_uncaptured(opened.device))
        if opened.backend in ON_GPU:
            _watch_gpu(metrics)
        on_status("loading the engines")
        pipeline = Pipeline.load(
            opened.manifest,
            bundle,
            backend=opened.backend,
            device=opened.device,
            step_times=step_times,
            trace=trace,
            decode_chunk=decode_chunk,
            decode_priority=decode_priority,
            safety=safety,
            step_cache=cache != "disabled",
            read=read,
            on_lookup=metrics.prompt_lookup,
        )
        on_loaded(LoadedModel(opened.manifest, opened.backend, pipeline))
        return pipeline

    intake = _intake(manifest, bundle, cache, read)
    executor = Executor(
        batcher,
        load,
        test_request=partial(_test_request, intake, manifest),
        step_times=step_times,
        trace=trace,
        metrics=metrics,
        hang_factor=hang_factor,
        on_ready=on_ready,
        on_failure=on_failure,
    )
    metrics.watch(_gauges(batcher, executor), step_times)
    return Runtime(intake, batcher, executor, metrics, step_times)


def _gauges(batcher: Batcher, executor: Executor) -> Mapping[str, tuple[str, Callable[[], float]]]:
    return {
        "latentd_requests_waiting": ("Requests that wait for their first step.", lambda: batcher.waiting),
        "latentd_requests_running": ("Requests that take steps.", lambda: batcher.running),
        "latentd_requests_decoding": ("Requests whose images are being decoded.", lambda: executor.decoding),
        "latentd_ready": ("1 when requests are accepted.", lambda: float(executor.readiness[0])),
    }


def _uncaptured(device: Device) -> Callable[[], Mapping[str, int]]:
    """Reads `device` as long as it lives: the metrics outlive the executor, which gives back the device's memory."""
    method = WeakMethod(device.uncaptured)
    return lambda: read() if (read := method()) else {}


def _watch_gpu(metrics: Metrics) -> None:
    """Add what NVML tells of the GPU, where CUDA names it."""
    from engines.backends.cuda import gpu_uuid  # noqa: PLC0415 - a server on a CPU need not load CUDA
    from server.runtime.monitoring.gpu import GpuMetrics  # noqa: PLC0415 - as above

    try:
        metrics.add_collector(GpuMetrics(gpu_uuid()))
    except Exception as error:  # cuda.bindings raises its own classes where it finds no library to call
        # Not the error itself: its traceback would keep the pipeline for as long as something keeps the log record.
        _log.info("no metrics of the GPU: %s", str(error))


def _test_request(intake: Intake, manifest: Manifest) -> Request:
    """A short request by the model's defaults, which should succeed. Raises ServerError where they allow none."""
    prompt = next(iter(manifest.examples), "")
    intake.request(GenerateRequest(prompt=prompt))  # with the default number of steps
    steps = min(manifest.defaults.num_inference_steps, _TEST_STEPS)
    return intake.request(GenerateRequest(prompt=prompt, seed=0, num_inference_steps=steps))


def _intake(manifest: Manifest, bundle: Path, cache: StepCache, read: Reader) -> Intake:
    tokenizer = PromptTokenizer(
        path := bundle / manifest.tokenizer.file.path,
        content=read(path),
        tokens=manifest.context.tokens,
        pad=manifest.tokenizer.pad,
        embeddings=manifest.tokenizer.embeddings,
    )
    return Intake(manifest, tokenizer, cache=cache)
