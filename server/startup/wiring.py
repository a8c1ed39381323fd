"""The wiring: bundles become a running service. Nothing here speaks HTTP."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from engines.backends.registry import open_device
from engines.errors import EngineError
from engines.manifest import Manifest
from server.access.allowances import Allowances
from server.api.body_limits import BodyLimits
from server.api.service import Service
from server.loras.catalogue import Catalogue
from server.loras.model_loras import ModelLoras
from server.loras.packed import PackedLoras
from server.requests.context import Allowance
from server.requests.image_files import ImageFiles, Sign
from server.runtime.degradation import Degradation
from server.runtime.make import LorasOf, make_runtime
from server.runtime.models import LoadedModel, ModelSource, OnStatus, Stopped
from server.runtime.monitoring.trace import Trace
from server.startup.autotune import choose_fastest
from server.startup.compiling import compile_missing
from server.startup.job_store import open_job_store
from server.startup.safety import choose_safety, load_prompt_check
from server.startup.served_files import OpenedBundle
from server.startup.settings import ServerSettings

if TYPE_CHECKING:
    from server.runtime.monitoring.spans import Spans


def make_service(
    bundles: Sequence[OpenedBundle],
    *,
    settings: ServerSettings,
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[Exception], None] = lambda _error: None,
    load_seconds: float | None = None,
) -> Service:
    """Assemble the service of opened bundles, of which the first is the default model.

    Once its executor is started, the fastest of the backends is chosen and the engines are loaded. With `load_seconds`
    a request for a model that is not loaded loads it, and waits so long; otherwise administrators load models.

    Raises:
        EngineError: a tokenizer, the certificate for C2PA, or the database of jobs cannot be used, a package or a
            check that is asked for is missing, or settings contradict each other.
    """
    first, degradation = bundles[0], _degradation(settings)
    prompt_check = load_prompt_check(settings.prompt_check) if settings.prompt_check else None

    def choose_backend(on_status: OnStatus, stopped: Stopped) -> str:
        return choose_fastest(
            first.manifest,
            first.folder,
            first.backends,
            threads=settings.threads,
            on_status=on_status,
            stopped=stopped,
        )

    def fail(error: EngineError) -> None:
        runtime.executor.fail(error)

    runtime = make_runtime(
        [_source(bundle, settings, fail) for bundle in bundles],
        choose_backend=choose_backend,
        open_device=partial(open_device, threads=settings.threads),
        max_waiting=settings.max_waiting,
        hang_factor=settings.watchdog,
        trace=Trace(Path(f"latentd-trace-{os.getpid()}.json") if settings.profile else None),
        cache=settings.cache,
        decode_chunk=settings.decode_chunk,
        decode_priority=settings.decode_priority if settings.overlap_decode else "between",
        model_memory=settings.model_memory,
        loras=_loras(settings),
        on_ready=on_ready,
        on_failure=on_failure,
    )
    return Service(
        runtime,
        BodyLimits(settings.max_body_memory * 2**20),
        _image_files(settings),
        Allowances(Allowance(settings.rate_limit, settings.max_concurrent)),
        prompt_check=prompt_check,
        log_prompts=settings.log_prompts,
        spans=_spans(settings.otlp_endpoint) if settings.otlp_endpoint else None,
        jobs=open_job_store(settings, runtime.metrics),
        degradation=degradation,
        load_seconds=load_seconds,
    )


def _degradation(settings: ServerSettings) -> Degradation | None:
    """Raises EngineError."""
    if settings.degrade_at is not None and settings.cache == "disabled":
        raise EngineError("--degrade-at raises the step cache, which --cache disabled leaves out: give one of them.")
    return None if settings.degrade_at is None else Degradation(settings.degrade_at)


def _source(bundle: OpenedBundle, settings: ServerSettings, fail: Callable[[EngineError], None]) -> ModelSource:
    """What loads the model of a bundle, again where it was unloaded. `fail` hears of files that were altered."""
    folder, files, newest = bundle.folder, bundle.files, bundle.manifest

    def prepare(backend: str, on_status: OnStatus, stopped: Stopped) -> Manifest:
        nonlocal newest
        files.prepare(newest, backend)
        if settings.compile:
            compiled = compile_missing(newest, folder, backend, on_status=on_status, stopped=stopped)
            if compiled is not newest:
                files.replace(compiled)
            newest = compiled
        return newest

    def on_loaded(loaded: LoadedModel) -> None:
        files.loaded(loaded.manifest, loaded.backend, fail)

    return ModelSource(
        name=bundle.name,
        manifest=bundle.manifest,
        bundle=folder,
        backend=bundle.backends[0],
        at_start=bundle.at_start,
        prepare=prepare,
        safety=choose_safety(settings.safety, bundle.manifest),
        read=files.read,
        on_loaded=on_loaded,
        on_unloaded=files.unloaded,
    )


def _loras(settings: ServerSettings) -> LorasOf | None:
    """Raises EngineError."""
    if settings.loras is None:
        return None
    if not settings.loras.is_dir():
        raise EngineError(f"--loras {settings.loras} is no folder: make it, or name the one with your LoRAs.")
    return partial(ModelLoras, Catalogue(settings.loras), PackedLoras(settings.lora_memory * 2**20))


def _spans(endpoint: str) -> Spans:
    try:
        from server.runtime.monitoring.spans import Spans  # noqa: PLC0415 - optional
    except ImportError as error:
        raise EngineError("--otlp-endpoint needs the packages of the extra otel: install it.") from error
    return Spans(endpoint)


def _image_files(settings: ServerSettings) -> ImageFiles:
    return ImageFiles(settings.embed_parameters, settings.mark_ai, _signer(settings))


def _signer(settings: ServerSettings) -> Sign | None:
    certificate, key = settings.c2pa_certificate, settings.c2pa_key
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise EngineError("C2PA needs both --c2pa-certificate and --c2pa-key: give the one that is missing.")
    from server.requests.content_credentials import Signer  # noqa: PLC0415 - optional

    return Signer(certificate, key)
