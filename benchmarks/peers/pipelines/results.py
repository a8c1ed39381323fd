"""The results file of a comparison of pipelines, peers.json."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from loadtest.provenance import ResultModel, Run


class PipelineSettings(ResultModel):
    """What is the same for all systems. Results can only be added under the same settings."""

    sizes: dict[str, int] = Field(description="denoising steps, by image size")
    repeats: int = Field(description="images of each measurement, after a warm-up of one step")
    rounds: int = Field(description="measurements of each system at each size")
    guidance: float
    threads: int
    prompts: tuple[str, ...] = Field(description="image k has seed k and prompt k, modulo their number")


class Measurement(ResultModel):
    """What one process of a system did, or why it did nothing."""

    system: str
    size: str
    round: int
    run: int = Field(description="index of the run")
    startup: float | None = Field(default=None, description="seconds from the start of the process to being ready")
    warm_up: float | None = Field(default=None, description="seconds of the first image, of one step")
    seconds: tuple[float, ...] = Field(default=(), description="of each image")
    errors: tuple[float, ...] = Field(
        default=(), description="mean squared difference from torch-eager's image, of colours 0 to 255"
    )
    peak_bytes: int = 0
    note: str = Field(default="", description="why there is no result")

    @property
    def key(self) -> tuple[str, str, int]:
        return self.system, self.size, self.round


class PipelineResults(BaseModel):
    """The file's content."""

    format: Literal[1] = 1
    settings: PipelineSettings
    runs: list[Run] = []
    peers_packages: dict[str, str] = Field(default={}, description="of --peers-python")
    seed_difference: dict[str, float] = Field(
        default={}, description="by size: mean squared difference of torch-eager's first two images"
    )
    measurements: list[Measurement] = []

    def find(self, key: tuple[str, str, int]) -> Measurement | None:
        return next((one for one in self.measurements if one.key == key), None)

    def put(self, measurement: Measurement) -> None:
        """Add `measurement`, in place of an earlier one of the same key."""
        self.measurements = [one for one in self.measurements if one.key != measurement.key] + [measurement]
