"""The step curve that a simulation starts from: how long a step of so many UNet rows takes."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt

from loadtest.provenance import ResultModel

ASSUMED = Path(__file__).with_name("assumed_curve.json")


class StepCurve(ResultModel):
    """The curve of one model on one GPU, a JSON file. Steps are padded to the next number of rows that it has."""

    name: str
    measured: bool = Field(
        description="whether the seconds were measured; otherwise `source` says what they follow from"
    )
    source: str
    seconds: dict[PositiveInt, PositiveFloat] = Field(min_length=1, description="seconds of a step by UNet rows")
    encode_decode: float = Field(ge=0, description="seconds that encoding and decoding an image take on the device")

    @classmethod
    def read(cls, path: Path) -> StepCurve:
        """Raises OSError, ValueError."""
        return cls.model_validate_json(path.read_bytes())

    @property
    def max_rows(self) -> int:
        return max(self.seconds)

    def step(self, rows: int) -> float:
        """The seconds of a step of `rows`, at most `max_rows`."""
        return self.seconds[min(padded for padded in self.seconds if padded >= rows)]

    def by_rows(self) -> tuple[float, ...]:
        """The seconds of steps of 0, 1, 2 … `max_rows`; 0 without rows."""
        return (0.0, *(self.step(rows) for rows in range(1, self.max_rows + 1)))

    def alone(self, *, rows: int, steps: int, images: int) -> float:
        """The seconds that a request takes on an idle server."""
        return steps * self.step(rows) + images * self.encode_decode

    def full(self, *, rows: int, steps: int, images: int) -> float:
        """The seconds that a request takes of a server which is always full: its part of full steps, and its images."""
        return steps * self.step(self.max_rows) * rows / self.max_rows + images * self.encode_decode
