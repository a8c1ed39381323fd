"""The one place that assembles a runtime: everything that runs requests, without HTTP."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakMethod

from engines.backends.device import Device
from engines.backends.registry import ON_GPU
from server.requests.intake import Intake
from server.requests.request import Request, StepCache
from server.requests.schemas import GenerateRequest
from server.requests.tokenizer import PromptTokenizer
from server.runtime.batcher import Batcher
from server.runtime.decodes import DecodePriority
from server.runtime.executor import Executor
from server.runtime.line import Line
from server.runtime.models import LoadedModel, Model, Models, ModelSource, OnStatus, Stopped
from server.runtime.monitoring.metrics import Metrics
from server.runtime.monitoring.trace import Trace
from server.runtime.pipeline import Pipeline

_log = logging.getLogger(__name__)
_TEST_STEPS = 2


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
    trace: Trace | None = None,
    cache: StepCache = "off",
    decode_chunk: int | None = None,
    decode_priority: DecodePriority = "equal",
    model_memory: int | None = None,  # noqa: ARG001 - not yet
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[Exception], None] = lambda _error: None,
) -> Runtime:
    """Assemble the runtime of verified bundles, of which the first is the default model. Nothing is loaded yet.

    Args:
        choose_backend: the backend of all models; called in the executor's thread, before any model is loaded.
        open_device: opens the device of that backend; called in the executor's thread.
        max_waiting: requests that may wait; see `Batcher`, as for `line`.
        hang_factor: see `Watchdog`.
        cache: the step cache of requests that do not set it; `disabled` does without its engine and its memory.
        decode_chunk: images decoded in one call; see `Pipeline`.
        decode_priority: how decodes share a GPU with steps.
        model_memory: MiB that loaded models may take together; idle ones are unloaded for others.
        on_ready, on_failure: called in the executor's thread.
    """
    trace = trace or Trace()
    models = Models([Model(source, _intake(source, cache)) for source in sources])
    default = models.default
    step_times = default.step_times
    max_rows = default.manifest.max_rows
    batcher = Batcher(max_waiting=max_waiting, line=line)
    lora_ranks = default.manifest.lora.ranks if default.manifest.lora else 0
    batcher.add(default.name, max_rows=max_rows, lora_ranks=lora_ranks, step_times=step_times)
    metrics = Metrics(max_rows=max_rows)

    def load(on_status: OnStatus) -> Pipeline:
        source = default.source
        backend = choose_backend(on_status, lambda: batcher.closed)
        if source.prepare:
            default.manifest = source.prepare(backend, on_status, lambda: batcher.closed)
        device = open_device(backend)
        metrics.set_model(default.manifest, backend)
        metrics.watch_captures(_uncaptured(device))
        if backend in ON_GPU:
            _watch_gpu(metrics)
        on_status("loading the engines")
        pipeline = Pipeline.load(
            default.manifest,
            source.bundle,
            backend=backend,
            device=device,
            step_times=step_times,
            trace=trace,
            decode_chunk=decode_chunk,
            decode_priority=decode_priority,
            safety=source.safety,
            step_cache=cache != "disabled",
            read=source.read,
            on_lookup=metrics.prompt_lookup,
        )
        default.backend = backend
        default.state = "ready"
        source.on_loaded(LoadedModel(default.manifest, backend, pipeline))
        return pipeline

    executor = Executor(
        batcher,
        load,
        test_request=partial(_test_request, default),
        step_times=step_times,
        trace=trace,
        metrics=metrics,
        hang_factor=hang_factor,
        on_ready=on_ready,
        on_failure=on_failure,
    )
    metrics.watch(_gauges(batcher, executor), step_times)
    return Runtime(models, batcher, executor, metrics)


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


def _test_request(model: Model) -> Request:
    """A short request by the model's defaults, which should succeed. Raises ServerError where they allow none."""
    manifest, intake = model.manifest, model.intake
    prompt = next(iter(manifest.examples), "")
    intake.request(GenerateRequest(prompt=prompt))  # with the default number of steps
    steps = min(manifest.defaults.num_inference_steps, _TEST_STEPS)
    return intake.request(GenerateRequest(prompt=prompt, seed=0, num_inference_steps=steps))


def _intake(source: ModelSource, cache: StepCache) -> Intake:
    manifest = source.manifest
    tokenizer = PromptTokenizer(
        path := source.bundle / manifest.tokenizer.file.path,
        content=source.read(path),
        tokens=manifest.context.tokens,
        pad=manifest.tokenizer.pad,
        embeddings=manifest.tokenizer.embeddings,
    )
    return Intake(manifest, tokenizer, model=source.name, cache=cache)
