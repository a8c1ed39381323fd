"""Settings of the server: each is a flag and a `LATENTD_…` environment variable."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from engines.backends.registry import BACKENDS
from engines.cli import Metavar, RepeatableSetting
from engines.demo import BUNDLE as DEMO
from server.access.hosts import ALLOWED
from server.access.rates import check_rate
from server.requests.depths import StepCache
from server.runtime.pipeline.safety import Mode
from server.runtime.pipeline.streams import DecodePriority
from server.startup.logs import LogFormat

AUTO = "auto"  # a value of `backend`
_PREFIX = "LATENTD_"
_ORIGIN = re.compile(r"\*|null|https?://[^\s/,?#@]+", re.IGNORECASE)
_HTTP_URL = re.compile(r"https?://[^\s?#]+", re.IGNORECASE)
_ROOT_PATH = re.compile(r"(/[\w.~-]+)*", re.ASCII)


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _origin(text: str) -> str:
    if not _ORIGIN.fullmatch(text):
        raise ValueError(f"{text!r} is not an origin: write https://example.com, without a path, or * for any")
    return text.lower()


def _http_url(text: str) -> str:
    if not _HTTP_URL.fullmatch(text):
        raise ValueError(f"{text!r} is not a URL: write http://localhost:4318")
    return text


def _host(text: str) -> str:
    if not ALLOWED.fullmatch(text):
        raise ValueError(f"{text!r} is not a host: write images.example.com, without a scheme or port, or * for any")
    return text.lower()


def _network(text: str) -> str:
    """As uvicorn takes it, which would take a name or a misspelt network without a word, and trust nobody for it."""
    try:
        ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"{error}: write addresses and networks, such as 127.0.0.1,10.0.0.0/8") from None
    return text


def _root_path(text: str) -> str:
    path = text.rstrip("/")
    if not _ROOT_PATH.fullmatch(path):
        raise ValueError(f"{text!r} is not a path: write /images, or /tools/images")
    return path


class ServerSettings(BaseSettings):
    """Serve Stable Diffusion over HTTP, from a bundle built by build_engines.py."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        cli_prog_name="python -m server",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        extra="ignore",
    )

    bundle: Annotated[RepeatableSetting[str], Metavar("[NAME=]DIR")] = Field(
        (str(DEMO),),
        description="folder of a bundle to serve, with NAME= by that name, or folder of several bundles; repeatable. "
        "The first model is that of requests that name none",
    )
    load: Annotated[RepeatableSetting[str], Metavar("NAME")] = Field(
        (), description="model to load at the start, repeatable; others wait until they are asked to load; default: all"
    )
    model_memory: int | None = Field(
        None,
        ge=1,
        description="MiB that loaded models may take together; to load another, those that have had no request for "
        "longest are unloaded; default: no limit",
    )
    loras: Path | None = Field(
        None,
        description="folder of LoRAs (.safetensors) that requests may choose, for a bundle built with --lora-slots; "
        "files may be added, replaced and removed while the server runs; default: there are none",
    )
    lora_memory: int = Field(
        1024,
        ge=1,
        le=1_048_576,
        description="MiB of main memory for LoRAs that are ready to be copied to the device; beyond it those that were "
        "used longest ago are read from their files again",
    )
    host: str = Field(
        "127.0.0.1",
        description="address to listen on; 0.0.0.0 accepts connections from other machines: give --api-keys with it",
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    root_path: Annotated[str, AfterValidator(_root_path)] = Field(
        "",
        description="path under which a reverse proxy publishes this server, such as /images; "
        "whether the proxy strips it from requests does not matter",
    )
    trusted_proxies: Annotated[
        tuple[Annotated[str, AfterValidator(_network)], ...], NoDecode, BeforeValidator(_split)
    ] = Field(
        (),
        description="addresses or networks of reverse proxies, such as 10.0.0.0/8, separated by commas. The caller of "
        "requests that they pass on is the one they name in X-Forwarded-For; from others that header is ignored; "
        "default: FORWARDED_ALLOW_IPS, or 127.0.0.1",
    )
    allowed_origins: Annotated[
        tuple[Annotated[str, AfterValidator(_origin)], ...], NoDecode, BeforeValidator(_split)
    ] = Field(
        (),
        description="origins whose web pages may call this server (CORS), such as https://example.com, separated by "
        "commas; *: any page; default: only pages of this server",
    )
    allowed_hosts: Annotated[tuple[Annotated[str, AfterValidator(_host)], ...], NoDecode, BeforeValidator(_split)] = (
        Field(
            (),
            description="names by which this server is reached, such as images.example.com or *.example.com, "
            "separated by commas; requests with another Host get 421. *: any; default: localhost if --host is that, "
            "otherwise any",
        )
    )
    api_keys: Path | None = Field(
        None,
        description="file of API keys, to which `python -m server.access NAME --file FILE` adds one; it is read again "
        "when it changes. Without it there is no authentication",
    )
    rate_limit: Annotated[str, AfterValidator(check_rate)] | None = Field(
        None,
        description="requests for images that one caller may send in a time, such as 60/minute; further ones get 429. "
        "A caller is an API key, or an address; default: no limit",
    )
    max_concurrent: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="requests for images that one caller may have waiting or running; further ones get 429; "
        "default: no limit",
    )
    backend: str | None = Field(
        None,
        description=f"backend that runs the model: {', '.join(BACKENDS)}; "
        "default: the first backend of the bundle that runs on this machine. "
        f"{AUTO}: a GPU backend of the bundle if one runs here, otherwise the fastest CPU backend, "
        "measured at the first start and cached",
    )
    compile: bool = Field(
        False,
        description="compile missing engines for this machine's GPU before loading. The first start then takes "
        "minutes, with progress at /v2/health/ready; the bundle folder must be writable",
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="CPU threads of the engines; 0: one per core, or as many as the container's CPU quota allows. "
        "Fewer threads leave CPU time to other programs and slow each step",
    )
    cache: StepCache = Field(
        "off",
        description="step cache of requests that do not set one. fast: reuse deep UNet features between steps, "
        "which is faster and changes images slightly. faster: fewer operations than fast, and a larger change. "
        "disabled: requests cannot ask for it either, which saves its memory and a part of the start",
    )
    degrade_at: float | None = Field(
        None,
        gt=0,
        le=3600,
        description="under load, raise the step cache of requests that do not set one: where a request would wait more "
        "than this many seconds, from off to fast or from fast to faster, and beyond twice as many by two positions. "
        "Images are made with fewer operations, and change slightly; default: never",
    )
    safety: Mode | None = Field(
        None,
        description="what becomes of images that a safety checker flags: flag sends them, marked; block answers 422; "
        "off: images are not checked. It is the bundle's checker, or else that of the extra `safety`; "
        "default: flag where the bundle has one, otherwise off",
    )
    prompt_check: str | None = Field(
        None,
        description="Python function package.module:function that is called with each prompt and negative prompt, and "
        "returns None or the reason for which they are refused",
    )
    max_waiting: int = Field(
        64,
        ge=1,
        le=100_000,
        description="maximum queue length; further requests are rejected with 429. "
        "A longer queue rejects fewer requests and increases latency under load",
    )
    max_connections: int = Field(
        1000,
        ge=1,
        le=50_000,
        description="maximum number of connections, as far as the limit of open files allows; beyond it the one that "
        "has been idle for longest is closed, and if none is idle, new ones get 503",
    )
    header_seconds: float = Field(
        10, gt=0, le=600, description="seconds for the headers of a request; silent connections are closed after them"
    )
    body_seconds: float = Field(
        20,
        gt=0,
        le=600,
        description="seconds after which a caller that sends a body, or reads a response, at less than 1 KiB per "
        "second is disconnected",
    )
    keep_alive_seconds: int = Field(20, ge=1, le=3600, description="seconds until an idle connection is closed")
    max_body_memory: int = Field(
        512,
        ge=64,
        le=65_536,
        description="MiB that request bodies of over 64 KiB may take until they are decoded; further ones get 503",
    )
    decode_chunk: int | None = Field(
        None,
        ge=1,
        le=64,
        description="maximum images per VAE decode call, of requests that finish in the same step; limited by what the "
        "bundle was built for, which is the default on a GPU; on a CPU it is 1",
    )
    decode_priority: DecodePriority = Field(
        "equal",
        description="on a GPU, how decodes share it with denoising steps: equal runs both in parallel at the same "
        "priority; low, too, but decodes wait for what steps leave, which may be little; between runs decodes between "
        "steps, which wait for them",
    )
    overlap_decode: bool = Field(True, description="--no-overlap-decode is --decode-priority between")
    embed_parameters: bool = Field(
        True,
        description="write the prompt and the settings into image files, as AUTOMATIC1111's web UI does; "
        "--no-embed-parameters leaves them out",
    )
    mark_ai: bool = Field(
        True,
        description="mark image files as made by a model, machine-readable: XMP's DigitalSourceType, of IPTC; "
        "--no-mark-ai leaves it out",
    )
    c2pa_certificate: Path | None = Field(
        None,
        description="sign image files with content credentials (C2PA): the certificate chain, leaf first, as PEM; "
        "needs the extra c2pa and --c2pa-key",
    )
    c2pa_key: Path | None = Field(None, description="private key of --c2pa-certificate, as PEM in PKCS #8")
    watchdog: float = Field(
        20,
        ge=0,
        description="a step that takes this many times longer than usual, and at least 10 seconds, counts as a device "
        "hang: the process exits with code 70; 0 disables the check",
    )
    job_ttl: float = Field(
        3600,
        gt=0,
        le=30 * 86_400,
        description="seconds for which a job (POST /generate?wait=false) and its images are kept after its end",
    )
    max_job_storage: int = Field(
        512,
        ge=1,
        le=1_048_576,
        description="MiB that the images of jobs may take; beyond it, jobs that ended first are removed",
    )
    jobs_database: Path | None = Field(
        None,
        description="SQLite file that stores jobs, so that they outlive the server: those that have not ended are run "
        "again at the next start; default: jobs are in memory and end with the server",
    )
    profile: bool = Field(
        False,
        description="write a trace of the first minute of work to latentd-trace-PID.json in the current folder, "
        "for https://ui.perfetto.dev",
    )
    drain_seconds: int = Field(
        30,
        ge=0,
        le=3600,
        description="on SIGTERM, seconds until accepted requests that are still running are cancelled. "
        "Keep it below the kill timeout of the supervisor",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="minimum level of log messages")
    otlp_endpoint: Annotated[str, AfterValidator(_http_url)] | None = Field(
        None,
        description="send OpenTelemetry traces to this collector, over OTLP/HTTP, as http://localhost:4318; needs the "
        "extra otel. OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER and other variables of the SDK apply",
    )
    log_format: LogFormat = Field("text", description="json: log messages as JSON, one object a line")
    log_prompts: bool = Field(
        False, description="log the prompts of every accepted request at level info; otherwise they are never logged"
    )
    access_log: bool = Field(
        False, description="log a line for every HTTP request, without its body; on at log level debug"
    )


def unknown_variables(environment: Iterable[str]) -> Iterator[str]:
    """A sentence for each variable that looks like a setting and is none."""
    known = ServerSettings.model_fields
    for variable in sorted(environment):
        prefix, name = variable[: len(_PREFIX)].upper(), variable[len(_PREFIX) :].lower()
        if prefix == _PREFIX and name not in known:
            close = get_close_matches(name, known, n=1)
            advice = f"did you mean {_PREFIX}{close[0].upper()}?" if close else "see --help."
            yield f"{variable} is no setting and has no effect: {advice}"
