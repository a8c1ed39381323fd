"""Every setting of the server: a flag, a `LATENTD_…` variable, and what to expect when it is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from engines.backends.registry import BACKENDS
from engines.demo import BUNDLE as DEMO
from server.requests.request import Cache

AUTO = "auto"  # as a backend


class Settings(BaseSettings):
    """Serve pictures over HTTP from a bundle made by build_engines.py."""

    model_config = SettingsConfigDict(
        env_prefix="LATENTD_",
        cli_prog_name="python -m server",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        extra="ignore",
    )

    bundle: Path = Field(DEMO, description="folder of the model to serve; the demo model unless given")
    host: str = Field(
        "127.0.0.1",
        description="address to listen on; 0.0.0.0 lets other machines in, without a password",
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    backend: str | None = Field(
        None,
        description=f"what runs the graphs: {' or '.join(BACKENDS)}; "
        "unless given, the first of the bundle's that runs here. "
        f"{AUTO} takes the bundle's GPU where there is one, and else what is the fastest on this CPU, "
        "measured at the first start and remembered",
    )
    compile: bool = Field(
        False,
        description="compile the engines that the bundle lacks for this machine's GPU before loading it. "
        "The first start takes minutes, which /v2/health/ready tells of; the bundle's folder has to be writable",
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="CPU threads of the engines; 0 takes one per core, or as many as a container's quota allows. "
        "Fewer leave room for other programs, and slow each step",
    )
    cache: Cache = Field(
        "off",
        description="what requests get that do not say: fast reuses deep features of the UNet between steps, which is "
        "quicker and changes pictures a little",
    )
    max_waiting: int = Field(
        64,
        ge=1,
        le=100_000,
        description="requests that may wait; more are refused with 429. "
        "A longer queue refuses fewer and lets each wait longer",
    )
    decode_chunk: int = Field(
        1,
        ge=1,
        le=64,
        description="pictures decoded in one call, as far as the bundle was built for it. "
        "More are decoded faster, and hold up the steps of others longer",
    )
    overlap_decode: bool = Field(
        True,
        description="on a GPU, decode in parallel with denoising steps; --no-overlap-decode decodes between them. "
        "Overlapping makes steps a little slower, and no request waits for a whole decode",
    )
    watchdog: float = Field(
        20,
        ge=0,
        description="a step may take so many times what it usually does, and at least 10 seconds, "
        "before the device counts as lost and the process ends with code 70; 0 waits forever",
    )
    profile: bool = Field(
        False,
        description="write what the first minute of work spends its time on to latentd-trace-PID.json "
        "in the current folder, for https://ui.perfetto.dev",
    )
    drain_seconds: int = Field(
        30,
        ge=0,
        le=3600,
        description="on SIGTERM, how long accepted requests may go on before they are cancelled. "
        "Keep it under your supervisor's kill timeout",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="how much is logged")
