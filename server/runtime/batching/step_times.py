"""How long steps take, by image size, depth and rows: measured during warm-up, and updated by every step since."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from engines.contract import DecoderName
from engines.manifest import Size
from server.requests.depths import DEPTHS, Depth
from server.requests.request import Request

StepWork = Literal[Depth, "full_lora", "shallow_lora"]  # what a step computes
Kind = tuple[Size, StepWork]  # of steps

_WEIGHT = 0.1  # of a new measurement in the moving average


def kind_of(size: Size, depth: Depth, *, loras: bool) -> Kind:
    """The kind of a step; with `loras`, any of its rows has some."""
    with_loras: dict[Depth, StepWork] = {"full": "full_lora", "shallow": "shallow_lora"}
    return size, with_loras[depth] if loras else depth


class StepTimeModel:
    """The curve from rows to seconds for each kind of step. For any thread."""

    def __init__(self, *, max_rows: int) -> None:
        self._max_rows = max_rows
        self.pads = False  # whether steps are padded to rows that are measured
        self._seconds: dict[Kind, dict[int, float]] = {}
        self._encode_decode: dict[tuple[Size, DecoderName], tuple[float, float]] = {}
        self._lock = threading.Lock()

    def observe(self, kind: Kind, rows: int, seconds: float) -> None:
        """Add a measurement: a step of `rows` took `seconds`."""
        with self._lock:
            known = self._seconds.setdefault(kind, {})
            known[rows] = known.get(rows, seconds) * (1 - _WEIGHT) + seconds * _WEIGHT

    def seconds(self, kind: Kind, rows: int) -> float:
        """The duration of a step of `rows`; 0 if unknown.

        Interpolated between measurements and proportional beyond, but where steps are padded as measured.
        """
        with self._lock:
            known = self._seconds.get(kind, {})
            padded = [seconds for count, seconds in known.items() if self.pads and count >= rows]
            return min(padded) if padded else _interpolate(known, rows)

    def cheapest(self, kind: Kind, row_counts: Sequence[int]) -> int:
        """The row count whose step takes the least time: kernels of a larger one are sometimes faster."""
        with self._lock:
            known = self._seconds.get(kind, {})
            return min(row_counts, key=lambda rows: _interpolate(known, rows))

    def observe_encode_decode(
        self, size: Size, seconds: float, *, init_image: float = 0.0, decoder: DecoderName = "vae"
    ) -> None:
        """Set the duration of encoding a request of one image and decoding that image by `decoder`.

        `init_image` is the part of it that only requests with an initial image, or to models that inpaint, take.
        """
        with self._lock:
            self._encode_decode[size, decoder] = seconds, init_image

    def encode_decode(self, size: Size, decoder: DecoderName = "vae") -> float:
        """The seconds that encoding and decoding take together; 0 if unknown."""
        with self._lock:
            return self._encode_decode.get((size, decoder), (0.0, 0.0))[0]

    def work(self, request: Request) -> float:
        """The seconds of a full device that the remaining steps of `request` take."""
        share = request.rows / self._max_rows
        kinds = {depth: kind_of(request.params.size, depth, loras=request.ranks > 0) for depth in DEPTHS}
        left = request.steps_left.items()
        return share * sum(count * self.seconds(kinds[depth], self._max_rows) for depth, count in left)

    def alone(self, request: Request) -> float:
        """The seconds that `request` takes on an idle device, from its prompt to its image; 0 if steps are unknown."""
        size, left = request.params.size, request.steps_left.items()
        steps = [
            count * self.seconds(kind_of(size, depth, loras=request.ranks > 0), request.rows) for depth, count in left
        ]
        with self._lock:
            around, init_image = self._encode_decode.get((size, request.params.decoder), (0.0, 0.0))
        around -= 0.0 if request.params.init_image or request.params.masked else init_image
        return sum(steps) + around * request.images if all(steps) else 0.0

    def curves(self) -> Mapping[Kind, Mapping[int, float]]:
        """Everything measured: seconds by rows, for each kind of step."""
        with self._lock:
            return {kind: dict(sorted(known.items())) for kind, known in self._seconds.items()}


def _interpolate(known: Mapping[int, float], rows: int) -> float:
    """The seconds at `rows` on the measured curve."""
    if rows in known:
        return known[rows]
    if not known:
        return 0.0
    counts, seconds = zip(*sorted(known.items()), strict=True)
    return float(np.interp(rows, counts, seconds) * max(rows / counts[-1], 1.0))
