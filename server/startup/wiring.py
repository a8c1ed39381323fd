"""The wiring: a bundle becomes a running service. Nothing here speaks HTTP."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from engines.backends.registry import open_device
from engines.errors import EngineError
from engines.manifest import Manifest
from server.access.allowances import Allowances
from server.api.body_limits import BodyLimits
from server.api.service import ServedModel, Service
from server.requests.context import Allowance
from server.requests.image_files import ImageFiles, Sign
from server.runtime.make import make_runtime
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
    opened: OpenedBundle,
    *,
    settings: ServerSettings,
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[Exception], None] = lambda _error: None,
) -> Service:
    """Assemble the service of an opened bundle.

    Once its executor is started, the fastest of the backends is chosen and its engines are loaded.

    Raises:
        EngineError: the tokenizer, the certificate for C2PA, or the database of jobs cannot be used, or a package or a
            check that is asked for is missing.
    """
    manifest, bundle, backends, files = opened.manifest, settings.bundle, opened.backends, opened.files
    model = ServedModel(manifest, backends[0])
    prompt_check = load_prompt_check(settings.prompt_check) if settings.prompt_check else None

    def choose_backend(on_status: OnStatus, stopped: Stopped) -> str:
        return choose_fastest(
            manifest, bundle, backends, threads=settings.threads, on_status=on_status, stopped=stopped
        )

    def prepare(backend: str, on_status: OnStatus, stopped: Stopped) -> Manifest:
        if not settings.compile:
            return manifest
        compiled = compile_missing(manifest, bundle, backend, on_status=on_status, stopped=stopped)
        if compiled is not manifest:
            files.replace(compiled)
        return compiled

    def on_loaded(loaded: LoadedModel) -> None:
        files.loaded(loaded.manifest, loaded.backend, runtime.executor.fail)
        model.update(loaded.manifest, loaded.backend)

    source = ModelSource(
        name=manifest.name,
        manifest=manifest,
        bundle=bundle,
        backend=backends[0],
        prepare=prepare,
        safety=choose_safety(settings.safety, manifest),
        read=files.read,
        on_loaded=on_loaded,
    )
    runtime = make_runtime(
        [source],
        choose_backend=choose_backend,
        open_device=partial(open_device, threads=settings.threads),
        max_waiting=settings.max_waiting,
        hang_factor=settings.watchdog,
        trace=Trace(Path(f"latentd-trace-{os.getpid()}.json") if settings.profile else None),
        cache=settings.cache,
        decode_chunk=settings.decode_chunk,
        decode_priority=settings.decode_priority if settings.overlap_decode else "between",
        on_ready=on_ready,
        on_failure=on_failure,
    )
    return Service(
        model,
        runtime,
        BodyLimits(settings.max_body_memory * 2**20),
        _image_files(settings),
        Allowances(Allowance(settings.rate_limit, settings.max_concurrent)),
        prompt_check=prompt_check,
        log_prompts=settings.log_prompts,
        spans=_spans(settings.otlp_endpoint, model) if settings.otlp_endpoint else None,
        jobs=open_job_store(settings, runtime.metrics),
    )


def _spans(endpoint: str, model: ServedModel) -> Spans:
    try:
        from server.runtime.monitoring.spans import Spans  # noqa: PLC0415 - optional
    except ImportError as error:
        raise EngineError("--otlp-endpoint needs the packages of the extra otel: install it.") from error
    return Spans(endpoint, lambda: model.manifest.name)


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
