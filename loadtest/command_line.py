"""The options of `python -m loadtest`."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Self, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliApp, PydanticBaseSettingsSource, SettingsConfigDict

from loadtest.options import BOTH_GIVEN
from loadtest.response_formats import FormatName
from loadtest.results import LoadLevel

T = TypeVar("T")


class InvalidOptions(ValueError):
    """Options that cannot be used; the message has a line for each."""


def _without_repetitions(values: list[T]) -> list[T]:
    return list(dict.fromkeys(values))


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]


class LoadTestOptions(BaseSettings):
    """Put load on a running latentd server, and report what it sustains.

    python -m loadtest --url http://127.0.0.1:8000 --rate 2 --rate 4 --duration 60 --out load    Poisson arrivals
    python -m loadtest --url http://127.0.0.1:8000 --sweep --duration 30 --out load              find the knee
    python -m loadtest --url http://127.0.0.1:8000 --users 8 --duration 60 --out load            closed loop of users

    It writes DIR/requests.jsonl, DIR/summary.json and DIR/report.html. The exit code is 1 if --baseline shows a
    regression, and 2 if nothing could be measured.
    """

    model_config = SettingsConfigDict(
        cli_prog_name="python -m loadtest",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_enforce_required=True,
    )

    url: str = Field("http://127.0.0.1:8000", description="the server")
    out: Path = Field(description="folder for the results")
    baseline: Path | None = Field(None, description="folder of an earlier run to compare with")
    rate: Annotated[list[Positive], AfterValidator(_without_repetitions)] = Field(
        [], description="requests per second with Poisson arrivals (open loop); may be repeated"
    )
    sweep: bool = Field(
        False,
        description="raise the rate past the knee (the highest rate that the server sustains), from --rate or a "
        "quarter of what an idle server completes one by one",
    )
    factor: Annotated[float, Field(gt=1.05, allow_inf_nan=False)] = Field(
        1.5, description="by which a sweep raises the rate"
    )
    users: Annotated[list[Count], AfterValidator(_without_repetitions)] = Field(
        [], description="users who each wait for their image (closed loop); may be repeated"
    )
    duration: Positive = Field(30, description="seconds of each load that count")
    warm_up: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        5, description="seconds of each load before those that count"
    )
    slo: Positive | None = Field(
        None, description="latency target in seconds; four times the idle latency unless given"
    )
    timeout: Positive = Field(120, description="seconds after which the client gives a request up")
    format: FormatName = Field("json", description="response format to request")
    prompt: list[str] = Field([], description="may be repeated; the model's examples unless given")
    steps: Count | None = Field(None, description="denoising steps; the model's default unless given")
    mix: Path | None = Field(
        None, description="JSON lines: the fields of a request on each, and its weight if it is not 1"
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of the arrivals and of the images")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic-settings' signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the command line alone: environment variables such as URL or OUT belong to other programs."""
        return (init_settings,)

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if not (self.rate or self.sweep or self.users):
            raise ValueError("give a load: --rate R, --sweep or --users N")
        if self.sweep and self.baseline:
            raise ValueError("--baseline compares equal loads, and a sweep chooses its own: use --rate, not --sweep")
        if self.mix and (self.prompt or self.steps):
            raise ValueError(BOTH_GIVEN)
        return self

    def load(self, *, rate: float | None = None, users: int | None = None) -> LoadLevel:
        """Return the load of `rate` or `users` with these durations."""
        return LoadLevel(rate=rate, users=users, warm_up=self.warm_up, seconds=self.duration)


def parse_options(words: Sequence[str]) -> LoadTestOptions:
    """Parse the command line. Raises InvalidOptions; exits where argparse finds an option missing or unknown."""
    # pydantic-settings splits the values of lists at commas, which prompts have; argparse takes them as they are.
    repeatable = ArgumentParser(prog="python -m loadtest", add_help=False, allow_abbrev=False)
    for option in ("--rate", "--users", "--prompt"):
        repeatable.add_argument(option, action="append", default=[])
    lists, others = repeatable.parse_known_args(words)
    try:
        return CliApp.run(LoadTestOptions, others, **vars(lists))
    except ValidationError as error:
        raise InvalidOptions("\n".join(_messages(error))) from None


def _messages(error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        option = f"--{str(item['loc'][0]).replace('_', '-')} {item['input']}: " if item["loc"] else ""
        yield option + item["msg"].removeprefix("Value error, ")
