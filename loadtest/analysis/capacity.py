"""What a server can make, from the curve of its step times. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

from prometheus_client.parser import text_string_to_metric_families
from pydantic import Field

from loadtest.provenance import ResultModel

_CURVE = "latentd_step_time_estimate_seconds"


class Work(ResultModel):
    """What one image costs besides the time of steps."""

    rows: int = Field(description="UNet rows: 2 with guidance, 1 without")
    steps: int = Field(description="UNet calls")
    encode_decode: float = Field(description="seconds of encoding its prompt and decoding it, on an idle server")


class Capacity(ResultModel):
    """The images per second of a server whose steps are full."""

    rows: int = Field(description="UNet rows of a full step")
    step: float = Field(description="seconds of such a step")
    images_per_second: float = Field(description="where decodes take their time from the steps, as on a CPU")
    images_per_second_of_steps: float = Field(description="where decodes take none, as a GPU with room beside them")

    @classmethod
    def of(cls, curve: Mapping[int, float], work: Work) -> Self:
        """The capacity for images that cost `work`, by the seconds of a step by rows. Raises ValueError without any."""
        if not curve:
            raise ValueError(f"{_CURVE} has no series of full steps: is the model loaded?")
        rows = max(curve)
        steps = work.rows * work.steps * curve[rows] / rows  # seconds of a full device for the steps of one image
        return cls(
            rows=rows,
            step=curve[rows],
            images_per_second=1 / (steps + work.encode_decode),
            images_per_second_of_steps=1 / steps,
        )

    def servers(self, images_per_second: float, *, utilization: float) -> int:
        """How many such servers make `images_per_second` with each at `utilization`, from 0 to 1."""
        return math.ceil(images_per_second / (self.images_per_second * utilization))


def read_curve(exposition: str, *, model: str, size: str) -> dict[int, float]:
    """The seconds of a full step of `model` at `size` (WIDTHxHEIGHT) by its rows, from the text of /metrics."""
    wanted = {"model": model, "size": size, "depth": "full"}
    return {
        int(sample.labels["rows"]): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
        if sample.name == _CURVE and wanted.items() <= sample.labels.items()
    }
