"""The one place that assembles a runtime: everything that runs requests, without HTTP."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakMethod

from engines.backends.device import Device
from engines.backends.registry import ON_GPU
from engines.manifest import Manifest
from server.requests.depths import StepCache
from server.requests.intake import Intake
from server.requests.loras import Loras
from server.requests.tokenizer import PromptTokenizer
from server.runtime.batching.batcher import Batcher
from server.runtime.batching.line import Line
from server.runtime.batching.quick_requests import QuickRequests
from server.runtime.executor import Executor
from server.runtime.models import Model, Models, ModelSource, OnStatus, Stopped
from server.runtime.monitoring.metrics import Metrics
from server.runtime.monitoring.trace import Trace
from server.runtime.pipeline.lora_pool import LoraWatch
from server.runtime.pipeline.pieces import Pieces
from server.runtime.pipeline.pipeline import Pipeline
from server.runtime.pipeline.streams import DecodePriority, Streams

_log = logging.getLogger(__name__)

LorasOf = Callable[[Manifest], Loras]  # the LoRAs of the server, as a model applies them


@dataclass(frozen=True, slots=True)
class Runtime:
    """The parts that run requests. `executor.start()` loads the models and begins."""

    models: Models
    batcher: Batcher
    executor: Executor
    metrics: Metrics


def make_runtime(  # noqa: PLR0913 - the parts and options, all by keyword
    sources: Sequence[ModelSource],
    *,
    choose_backend: Callable[[OnStatus, Stopped], str],
    open_device: Callable[[str], Device],
    max_waiting: int,
    hang_factor: float,
    line: Callable[[], Line] = Line,
    quick: QuickRequests | None = None,
    trace: Trace | None = None,
    cache: StepCache = "off",
    decode_chunk: int | None = None,
    decode_priority: DecodePriority = "equal",
    model_memory: int | None = None,
    loras: LorasOf | None = None,
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[Exception], None] = lambda _error: None,
) -> Runtime:
    """Assemble the runtime of verified bundles, of which the first is the default model. Nothing is loaded yet.

    Args:
        choose_backend: the backend of all models; called in the executor's thread, before any model is loaded.
        open_device: opens the device of that backend; called in the executor's thread.
        max_waiting: requests that may wait; see `Batcher`, as for `line` and `quick`.
        hang_factor: see `Watchdog`.
        cache: the step cache of requests that do not set it; `disabled` does without its engine and its memory.
        decode_chunk: images decoded in one call; see `Pipeline`.
        decode_priority: how decodes share a GPU with steps.
        model_memory: MiB that loaded models may take together; idle ones are unloaded for others.
        loras: gives the LoRAs that requests to a model may choose; None: they may not.
        on_ready, on_failure: called in the executor's thread.
    """
    trace = trace or Trace()
    batcher = Batcher(max_waiting=max_waiting, line=line, quick=quick)
    models = Models(
        [Model(source, _intake(source, cache, loras), batcher) for source in sources],
        batcher,
        memory=None if model_memory is None else model_memory * 2**20,
    )
    metrics = Metrics(
        max_rows=max(source.manifest.max_rows for source in sources), models=[source.name for source in sources]
    )

    def open_watched(backend: str) -> Device:
        device = open_device(backend)
        metrics.watch_captures(_uncaptured(device))
        if backend in ON_GPU:
            _watch_gpu(metrics)
        return device

    def make_pipeline(model: Model, device: Device, streams: Streams) -> Pieces[Pipeline]:
        metrics.set_model(model.name, model.manifest, model.backend)
        return Pipeline.load(
            model.manifest,
            model.source.bundle,
            backend=model.backend,
            device=device,
            streams=streams,
            step_times=model.step_times,
            trace=trace,
            decode_chunk=decode_chunk,
            safety=model.source.safety,
            step_cache=cache != "disabled",
            read=model.source.read,
            on_lookup=metrics.prompt_lookup,
            lora_watch=_lora_watch(metrics, model),
        )

    executor = Executor(
        models,
        batcher,
        choose_backend=choose_backend,
        open_device=open_watched,
        open_streams=partial(Streams.open, decode_priority=decode_priority),
        make_pipeline=make_pipeline,
        trace=trace,
        metrics=metrics,
        hang_factor=hang_factor,
        on_ready=on_ready,
        on_failure=on_failure,
    )
    metrics.watch(_gauges(batcher, executor), models)
    return Runtime(models, batcher, executor, metrics)


def _lora_watch(metrics: Metrics, model: Model) -> LoraWatch:
    def set_resident(hashes: frozenset[str]) -> None:
        model.resident_loras = hashes

    return LoraWatch(partial(metrics.lora_lookup, model.name), partial(metrics.lora_ranks, model.name), set_resident)


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


def _intake(source: ModelSource, cache: StepCache, loras: LorasOf | None) -> Intake:
    manifest = source.manifest
    tokenizer = PromptTokenizer(
        path := source.bundle / manifest.tokenizer.file.path,
        content=source.read(path),
        tokens=manifest.context.tokens,
        pad=manifest.tokenizer.pad,
        pad_2=manifest.tokenizer.pad_2,
        embeddings=manifest.tokenizer.embeddings,
    )
    return Intake(manifest, tokenizer, model=source.name, cache=cache, loras=loras and loras(manifest))
