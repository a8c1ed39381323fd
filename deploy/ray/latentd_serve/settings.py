"""What the application takes in addition to the settings of the server: `args` in a configuration file."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from server.startup.settings import ServerSettings


class Arguments(BaseModel):
    """`args` of the application."""

    model_config = ConfigDict(extra="forbid")

    server: dict[str, Any] = Field(
        default_factory=dict,
        description="settings of the server, as `bundle: [/bundles/sd15]`; others are those of each replica's "
        "LATENTD_… variables. Paths are those of the nodes",
    )
    wait_seconds: float = Field(
        60, gt=0, le=3600, description="seconds that a request waits for a replica with room; then it gets 503"
    )
    load_seconds: float = Field(
        120, gt=0, le=3600, description="seconds that a request waits for its model to be loaded; then it gets 503"
    )

    def settings(self) -> ServerSettings:
        """The settings of a replica. Raises ValueError for a setting that does not exist or has a wrong value."""
        if unknown := sorted(set(self.server) - set(ServerSettings.model_fields)):
            raise ValueError(f"args.server.{unknown[0]} is no setting: `python -m server --help` lists them, with _.")
        if ignored := sorted(set(self.server) & _PROXYS):
            raise ValueError(f"args.server.{ignored[0]} has no effect: connections are those of Ray Serve's proxies.")
        return ServerSettings(**self.server)


# Settings of connections, and of jobs, which are refused.
_PROXYS = frozenset(
    {
        "host",
        "port",
        "max_connections",
        "header_seconds",
        "body_seconds",
        "keep_alive_seconds",
        "drain_seconds",
        "job_ttl",
        "max_job_storage",
        "jobs_database",
        "log_format",
    }
)
