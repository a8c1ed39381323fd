"""The command line of the GPU benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveInt
from pydantic_settings import NoDecode, SettingsConfigDict

from benchmarks import models
from benchmarks.cli import Seconds
from benchmarks.gpu.figures import POLICIES
from benchmarks.gpu.results_file import STAGES, Stage
from engines.backends.registry import BACKENDS
from engines.cli import CommandLine, RepeatableList


def _split(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


# Lists in one value, such as 2,4,8; counts in order.
Stages = Annotated[tuple[Stage, ...], NoDecode, BeforeValidator(_split)]
Counts = Annotated[
    tuple[PositiveInt, ...],
    NoDecode,
    BeforeValidator(_split),
    AfterValidator(lambda counts: tuple(sorted(set(counts)))),
]
_OF_TORCH = {"torch", "batch", "compile", "compile_batch"}
LOADING = 45  # seconds: an estimate of loading engines and warming up


class GpuBenchCommand(CommandLine):
    """Measure the server on this machine, and PyTorch for comparison.

    python -m benchmarks.gpu --out DIR                          all backends that run here, with the small model
    python -m benchmarks.gpu --out DIR --only rows,serve        some stages, measured again
    python -m benchmarks.gpu --out DIR --plan                   what each call would measure, and its seconds
    python -m benchmarks.gpu --out DIR --bundle engines/demo    an existing bundle, on any machine

    Each result is saved at once, in DIR/<device>-<date>.json. A second call continues where the first ended: it
    measures stages that the file holds only if --only names them.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m benchmarks.gpu")

    out: Path = Field(description="folder for results and for models that are made")
    model: RepeatableList[str] = Field(
        (),
        description=f"{' or '.join(models.ARCHITECTURES)}, with random weights, or a diffusers folder; default: small",
    )
    bundle: Path | None = Field(None, description="bundle to use as it is; --model is then what PyTorch loads")
    backend: RepeatableList[Annotated[str, Field(pattern=f"^(auto|{'|'.join(BACKENDS)})$")]] = Field(
        ("auto",), description=f"of {', '.join(BACKENDS)}; auto takes the GPU's that run here, or else one of the CPU's"
    )
    only: Stages = Field((), description=f"stages to measure, again if need be, of {','.join(STAGES)}")
    skip_torch: bool = Field(False, description="leave out PyTorch")
    steps: Counts = Field((20, 50), description="denoising steps of an image")
    rows: Counts = Field((2, 8, 16, 32), description="UNet rows in a step, and of PyTorch's batches")
    runs: PositiveInt = Field(10, description="images for each latency")
    seconds: Seconds = Field(8.0, description="seconds at each number of rows")
    serve_seconds: Seconds = Field(20.0, description="seconds in which requests arrive, for each load")
    serve_rows: PositiveInt = Field(16, description="UNet rows in a step at most, in the serve stage")
    loads: Counts = Field((50, 80, 95), description="request rates, per cent of saturation")
    slo: Seconds = Field(5.0, description="latency target, in latencies of an idle server")
    seed: int = Field(0, description="seed of arrival times")
    threads: NonNegativeInt = Field(0, description="CPU threads of engines on a CPU; 0 takes one per core")
    budget: float = Field(
        540.0, gt=0, description="seconds this call may take: what does not fit is left to the next call"
    )
    plan: bool = Field(False, description="only print the calls that are to be made, by guesses of each stage")

    @property
    def backends(self) -> tuple[str, ...]:
        """Those named; none for auto."""
        return () if "auto" in self.backend else tuple(dict.fromkeys(self.backend))

    @property
    def load_shares(self) -> tuple[float, ...]:
        """Request rates as shares of saturation."""
        return tuple(percent / 100 for percent in self.loads)

    @property
    def mix(self) -> tuple[int, int]:
        """The fewest and the most steps of requests in the serve stage."""
        return min(self.steps), max(self.steps)

    def wants(self, stage: Stage) -> bool:
        if self.skip_torch and stage in _OF_TORCH:
            return False
        return stage in self.only if self.only else True

    def needs(self, stage: Stage) -> float:
        """Seconds that a stage may take on a GPU, engines loaded: guesses, by which the budget is kept."""
        serving = self.serve_seconds * (1 + len(POLICIES) * len(self.load_shares)) * 1.2
        return {
            "peak": 10.0,
            "torch": 60.0,
            "batch": 45.0,
            "build": 240.0,
            "rows": self.seconds * len(self.rows) * 1.5,
            "single": 20.0,
            "serve": serving,
            "decode": 2 * (LOADING + self.seconds * 1.5),
            "lora": 420.0,  # most of it builds a bundle with graphs for LoRAs
            "compile": 300.0,
            "compile_batch": 150.0,
        }[stage]
