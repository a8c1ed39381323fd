"""The results file of the LoRA benchmark: raw values, and the numbers that follow from them."""

from __future__ import annotations

import statistics

from pydantic import Field

from loadtest.provenance import ResultModel, Run

Ranks = tuple[int, ...]  # of the LoRAs in a step, each of another image; empty: no LoRA, so the plain graph


class StepTimes(ResultModel):
    """Steps with the same LoRAs, in as many rounds as the steps that they are compared with."""

    ranks: Ranks
    rounds: tuple[tuple[float, ...], ...] = Field(description="seconds of each step, by round")

    @property
    def seconds(self) -> float:
        return statistics.median(value for one in self.rounds for value in one)

    def ratio(self, plain: StepTimes) -> float:
        """How much longer than plain steps of the same round: the median over the rounds."""
        pairs = zip(self.rounds, plain.rounds, strict=True)
        return statistics.median(statistics.median(ours) / statistics.median(theirs) for ours, theirs in pairs)


class StepCounts(ResultModel):
    """What one step of one row does."""

    nodes: int = Field(description="of the graph, that run")
    kernels: int = Field(description="that ONNX Runtime runs on a CPU once it has fused what it can")
    flops: float = Field(description="of matrix products and convolutions")
    gathered: int = Field(description="bytes of LoRAs' factors that the row reads from the pool")


class CountedRank(ResultModel):
    """A step in which LoRAs of one rank update the row."""

    rank: int
    counts: StepCounts
    layout: int = Field(description="bytes of the factors by the layout of the pool, which `gathered` must be")


class GraphFigures(ResultModel):
    """What the graphs do, whatever runs them."""

    size: str
    plain: StepCounts
    ranks: tuple[CountedRank, ...]


class TimedSteps(ResultModel):
    """Steps of one backend."""

    backend: str
    device: str
    size: str
    rows: int = Field(description="of each step: two of each image")
    steps: tuple[StepTimes, ...] = Field(description="the first are the plain ones")


class LoraResults(ResultModel):
    """The results file."""

    run: Run
    model: str
    layers: int = Field(description="of the UNet that LoRAs may update")
    slots: int
    rank: int = Field(description="the largest of a LoRA")
    pool: int = Field(description="bytes of the LoRA pool")
    graphs: GraphFigures | None = None
    timed: tuple[TimedSteps, ...] = ()
    notes: tuple[str, ...] = Field(default=(), description="what was not measured, and why")
