"""The options of `python -m loadtest`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from engines.cli import CommandLine, Metavar, Repeatable
from loadtest.analysis.results import LoadLevel
from loadtest.mix import Wanted
from loadtest.options import BOTH_GIVEN
from loadtest.response_formats import FormatName


def _distinct(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(dict.fromkeys(values))


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]


class LoadTestOptions(CommandLine):
    """Put load on a running latentd server, and report what it sustains.

    python -m loadtest --url http://127.0.0.1:8000 --rate 2 --rate 4 --duration 60 --out load    Poisson arrivals
    python -m loadtest --url http://127.0.0.1:8000 --sweep --duration 30 --out load              find the knee
    python -m loadtest --url http://127.0.0.1:8000 --users 8 --duration 60 --out load            closed loop of users

    It writes DIR/requests.jsonl, DIR/summary.json and DIR/report.html. The exit code is 1 if --baseline shows a
    regression, and 2 if nothing could be measured or the server died.
    """

    url: str = Field("http://127.0.0.1:8000", description="the server, or the balancer before several")
    server: Annotated[Repeatable[str], Metavar("URL")] = Field(
        (), description="a server behind the balancer at --url, may be repeated: their metrics are added up"
    )
    out: Annotated[Path, Metavar("DIR")] = Field(description="folder for the results")
    baseline: Annotated[Path | None, Metavar("DIR")] = Field(
        None, description="folder of an earlier run to compare with"
    )
    rate: Annotated[Repeatable[Positive], AfterValidator(_distinct), Metavar("R")] = Field(
        (), description="requests per second with Poisson arrivals (open loop); may be repeated"
    )
    sweep: bool = Field(
        False,
        description="raise the rate past the knee (the highest rate that the server sustains), from --rate or a "
        "quarter of what an idle server completes one by one",
    )
    factor: Annotated[float, Field(gt=1.05, allow_inf_nan=False)] = Field(
        1.5, description="by which a sweep raises the rate"
    )
    users: Annotated[Repeatable[Count], AfterValidator(_distinct), Metavar("N")] = Field(
        (), description="users who each wait for their image (closed loop); may be repeated"
    )
    duration: Annotated[Positive, Metavar("S")] = Field(30, description="seconds of each load that count")
    warm_up: Annotated[float, Field(ge=0, allow_inf_nan=False), Metavar("S")] = Field(
        5, description="seconds of each load before those that count"
    )
    slo: Annotated[Positive | None, Metavar("S")] = Field(
        None, description="latency target in seconds; four times the idle latency unless given"
    )
    timeout: Annotated[Positive, Metavar("S")] = Field(
        120, description="seconds after which the client gives a request up"
    )
    format: FormatName = Field("json", description="response format to request")
    prompt: Repeatable[str] = Field((), description="may be repeated; the model's examples unless given")
    steps: Annotated[Count | None, Metavar("N")] = Field(
        None, description="denoising steps; the model's default unless given"
    )
    model: Repeatable[str] = Field(
        (), description="may be repeated, for a mix of models; the server's default unless given"
    )
    lora: Annotated[Repeatable[str], Metavar("NAME[:WEIGHT]")] = Field(
        (), description="a LoRA of the server's, may be repeated: each request has one of them"
    )
    mix: Annotated[Path | None, Metavar("FILE")] = Field(
        None, description="JSON lines: the fields of a request on each, and its weight if it is not 1"
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of the arrivals and of the images")

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if not (self.rate or self.sweep or self.users):
            raise ValueError("give a load: --rate R, --sweep or --users N")
        if self.sweep and self.baseline:
            raise ValueError("--baseline compares equal loads, and a sweep chooses its own: use --rate, not --sweep")
        if self.mix and self.wanted:
            raise ValueError(BOTH_GIVEN)
        return self

    @property
    def wanted(self) -> Wanted:
        """What requests have without a mix."""
        return Wanted(self.prompt, self.steps, self.model, self.lora)

    def load(self, *, rate: float | None = None, users: int | None = None) -> LoadLevel:
        """Return the load of `rate` or `users` with these durations."""
        return LoadLevel(rate=rate, users=users, warm_up=self.warm_up, seconds=self.duration)
