"""The wiring: a bundle becomes the rooms of a running service. Nothing here speaks HTTP."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from engines.backends.registry import open_device
from engines.manifest import Manifest
from server.api.service import Service
from server.requests.intake import Intake
from server.requests.tokenizer import Tokenizer
from server.runtime.batcher import Batcher
from server.runtime.executor import Executor
from server.runtime.metrics import Metrics
from server.runtime.pipeline import Pipeline
from server.runtime.step_times import StepTimeModel
from server.runtime.trace import Trace
from server.startup.autotune import fastest
from server.startup.compiling import compile_missing
from server.startup.settings import Settings


def make_service(
    manifest: Manifest,
    bundle: Path,
    *,
    backends: Sequence[str],
    settings: Settings,
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[Exception], None] = lambda _error: None,
) -> Service:
    """Wire the rooms around the verified bundle in folder `bundle`.

    Once the executor is started, the fastest of `backends` is found and its engines are loaded.
    """
    tokenizer = Tokenizer(
        bundle / manifest.tokenizer.file.path,
        tokens=manifest.context.tokens,
        pad=manifest.tokenizer.pad,
        embeddings=manifest.tokenizer.embeddings,
    )
    intake = Intake(manifest, tokenizer, cache=settings.cache)
    step_times = StepTimeModel(max_rows=manifest.max_rows)
    trace = Trace(Path(f"latentd-trace-{os.getpid()}.json") if settings.profile else None)
    batcher = Batcher(max_rows=manifest.max_rows, max_waiting=settings.max_waiting, work=step_times.work)
    metrics = Metrics(max_rows=manifest.max_rows)

    def load(tell: Callable[[str], None]) -> Pipeline:
        def stopped() -> bool:
            return batcher.closed

        backend = fastest(manifest, bundle, backends, threads=settings.threads, tell=tell, stopped=stopped)
        whole = manifest
        if settings.compile:
            whole = compile_missing(manifest, bundle, backend, tell=tell, stopped=stopped)
        service.manifest, service.backend = whole, backend
        metrics.loaded(whole, backend)
        tell("loading the engines")
        return Pipeline.load(
            whole,
            bundle,
            backend=backend,
            device=open_device(backend, threads=settings.threads),
            step_times=step_times,
            trace=trace,
            decode_chunk=settings.decode_chunk,
            decode_beside=settings.decode_beside,
            on_lookup=metrics.prompt_lookup,
        )

    executor = Executor(
        batcher,
        load,
        step_times=step_times,
        trace=trace,
        metrics=metrics,
        patience=settings.watchdog,
        on_ready=on_ready,
        on_failure=on_failure,
    )
    gauges = {
        "latentd_requests_waiting": ("Accepted requests that wait for their first step.", lambda: batcher.waiting),
        "latentd_requests_running": ("Requests that take steps.", lambda: batcher.running),
        "latentd_requests_departing": ("Requests whose pictures are decoded.", lambda: executor.departing),
        "latentd_ready": ("1 when requests are answered.", lambda: float(executor.ready)),
    }
    metrics.watch(gauges, step_times)
    service = Service(manifest, backends[0], intake, batcher, executor, metrics)
    return service
