"""Requests and results of a comparison of servers, serving.json."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from loadtest.analysis.results import LoadMetrics
from loadtest.mix import Mix, MixEntry
from loadtest.provenance import ResultModel, Run

Scenario = Literal["same", "mixed"]
SCENARIOS: tuple[Scenario, ...] = ("same", "mixed")
SLO = 4.0  # times the latency of the idle yardstick
YARDSTICK = "fastapi"  # the server from whose latency the rates and the SLO follow, for all servers

_PROMPTS = (
    "a red heart on a yellow background",
    "a penguin on a blue background",
    "a rocket on a black background",
    "a strawberry on a white background",
    "an owl on an orange background",
    "a cactus on a pink background",
)
# Steps as a share of the base, scheduler, guidance, and weight: half of the callers use the defaults.
_DEFAULTS = (1.0, "dpmpp_2m", 4.0, 5.0)
_MIXED = (
    _DEFAULTS,
    (0.5, "dpmpp_2m_karras", 4.0, 1.0),
    (0.5, "euler", 4.0, 1.0),
    (1.0, "euler_ancestral", 7.5, 1.0),
    (1.5, "ddim", 7.5, 1.0),
    (1.5, "unipc", 4.0, 1.0),
)


class ScenarioResult(ResultModel):
    """A server's results in a scenario."""

    scenario: Scenario
    alone: tuple[float, ...] = Field(description="seconds of each entry on this server when idle")
    points: tuple[LoadMetrics, ...] = Field(description="by rate, the lowest first")


class ServerResult(ResultModel):
    """A server's results, or why it was not measured."""

    server: str
    run: int = Field(description="which of the runs")
    ready_after: float | None = Field(default=None, description="seconds from starting its process to ready")
    memory: int | None = Field(
        default=None, description="peak of all its processes in bytes (PSS: shared pages count once)"
    )
    psnr: float | None = Field(
        default=None,
        description="lowest PSNR in dB of an image of each entry, compared with the yardstick's; 999: identical",
    )
    loads: tuple[ScenarioResult, ...] = ()
    note: str = ""

    def under(self, scenario: Scenario) -> ScenarioResult | None:
        return next((one for one in self.loads if one.scenario == scenario), None)


class ServingSettings(ResultModel):
    """What is the same for all servers."""

    rates: tuple[float, ...] = Field(
        description="request rates, as shares of what the yardstick serves one after the other"
    )
    seconds: float = Field(description="of each rate that count")
    warm_up: float
    steps: int
    threads: int
    seed: int


class ServingResults(BaseModel):
    """serving.json."""

    format: Literal[1] = 1
    settings: ServingSettings
    scenarios: dict[Scenario, tuple[MixEntry, ...]]
    peers: dict[str, str] = Field(description="packages of the peers' interpreter")
    runs: list[Run] = []
    results: list[ServerResult] = []

    def find(self, server: str) -> ServerResult | None:
        return next((one for one in self.results if one.server == server), None)

    def put(self, result: ServerResult) -> None:
        self.results = [*(one for one in self.results if one.server != result.server), result]

    def mix(self, scenario: Scenario) -> Mix:
        return Mix(self.scenarios[scenario], self.settings.seed)

    def idle(self, scenario: Scenario) -> float | None:
        """Seconds of a request on the idle yardstick; None until it is measured."""
        found = self.find(YARDSTICK)
        under = found.under(scenario) if found else None
        return self.mix(scenario).mean(under.alone) if under else None


def entries(scenario: Scenario, steps: int) -> tuple[MixEntry, ...]:
    """The requests of a scenario: alike except for prompts and seeds, or of several kinds."""
    kinds = _MIXED if scenario == "mixed" else (_DEFAULTS,) * len(_PROMPTS)
    return tuple(_entry(kind, prompt, steps) for kind, prompt in zip(kinds, _PROMPTS, strict=True))


def _entry(kind: tuple[float, str, float, float], prompt: str, steps: int) -> MixEntry:
    share, scheduler, guidance, weight = kind
    fields = {
        "prompt": prompt,
        "num_inference_steps": max(round(share * steps), 1),
        "scheduler": scheduler,
        "guidance_scale": guidance,
    }
    return MixEntry(name=f"{fields['num_inference_steps']} steps of {scheduler}", weight=weight, fields=fields)
