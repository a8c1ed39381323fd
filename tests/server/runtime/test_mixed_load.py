"""Requests of one step and of thirty: how long both take in virtual time, at 80 % of what the device can do."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest

from server.requests.request import Completed, Event
from tests.support.virtual import VirtualDevice, VirtualRun

QUICK: Mapping[str, Any] = {"steps": 1, "guidance_scale": 1.0}
LONG: Mapping[str, Any] = {"steps": 30, "guidance_scale": 7.0}
MAX_ROWS = 16  # of the demo bundle


class Machine(NamedTuple):
    """What things take on a device, in seconds."""

    step: float
    row: float  # of a step
    encode: float
    decode: float
    is_gpu: bool  # encodes and decodes in parallel with steps, which are padded

    def seconds(self, graph: str, rows: int) -> float:
        step = self.step + self.row * rows
        return {"denoise": step, "encode_prompt": self.encode, "decode": self.decode}.get(graph, 1e-4)

    def cost(self, fields: Mapping[str, Any]) -> float:
        """The seconds of the device that a request takes, in full steps."""
        rows = 2 if fields["guidance_scale"] > 1 else 1
        row = (self.step + self.row * MAX_ROWS) / MAX_ROWS
        return float(row * rows * fields["steps"] + (0 if self.is_gpu else self.decode))


MACHINES = {
    "GPU": Machine(0.006, 0.003, 0.004, 0.020, is_gpu=True),
    "GPU with room": Machine(0.020, 0.0001, 0.004, 0.020, is_gpu=True),
    "CPU": Machine(0.002, 0.0056, 0.0005, 0.011, is_gpu=False),
}


def arrivals(machine: Machine) -> list[tuple[float, bool]]:
    """When requests arrive, and whether they are quick, as three of ten are."""
    rng = random.Random(3)
    gap = (0.3 * machine.cost(QUICK) + 0.7 * machine.cost(LONG)) / 0.8
    moments = np.cumsum([rng.expovariate(1 / gap) for _ in range(150)]).tolist()
    return [(moment, rng.random() < 0.3) for moment in moments]


def latencies(
    machine: Machine, load: Sequence[tuple[float, bool]], *, models: Sequence[str]
) -> Mapping[bool, Sequence[float]]:
    """The seconds of quick requests, and of long ones; those are of the last and the first of `models`."""
    idle, is_gpu = (lambda _graph, _rows: 0.0), machine.is_gpu
    run = VirtualRun(
        lambda clock: VirtualDevice(
            clock,
            seconds=machine.seconds if is_gpu else idle,
            host=idle if is_gpu else machine.seconds,
            pads=is_gpu,
        ),
        models=models,
    )
    spent: dict[bool, list[float]] = defaultdict(list)

    def arrive(number: int, is_quick: bool) -> None:
        def hear(event: Event, arrived: float = run.clock.now) -> None:
            if isinstance(event, Completed):
                spent[is_quick].append(run.clock.now - arrived)
                if sum(map(len, spent.values())) == len(load):
                    run.close()

        fields, model = (QUICK, models[-1]) if is_quick else (LONG, models[0])
        run.ask(seed=number % 20, model=model, on_event=hear, **fields)

    def scenario() -> None:
        for number, (moment, is_quick) in enumerate(load):
            run.clock.at(run.clock.now + moment, partial(arrive, number, is_quick))

    run.run(scenario)
    return spent


@pytest.mark.parametrize(
    ("name", "models"),
    [("GPU", ("demo",)), ("GPU with room", ("demo",)), ("CPU", ("demo",)), ("CPU", ("sd", "turbo"))],
)
def test_one_step_takes_at_most_three_times_as_long_as_without_the_long_requests(
    name: str, models: Sequence[str]
) -> None:
    machine = MACHINES[name]
    load = arrivals(machine)
    quick, long = (
        latencies(machine, [one for one in load if one[1] == is_quick], models=models)[is_quick]
        for is_quick in (True, False)
    )
    mixed = latencies(machine, load, models=models)
    assert np.percentile(mixed[True], 95) <= 3 * np.percentile(quick, 95)
    assert np.mean(mixed[False]) <= 1.25 * np.mean(long)
