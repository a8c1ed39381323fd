"""A plan's way to the device."""

from __future__ import annotations

import numpy as np
import pytest

from engines.backends.onnxruntime import OnnxRuntimeDevice
from engines.contract import LANES, TERMS, Array
from server.runtime.latent_pool import PlanMemory
from server.runtime.plan import Plan, RowLayout, StepShape

LATENT = (4, 8, 8)


def plan(value: float, *, noise: bool) -> Plan:
    """For two images in three rows, of which every number is `value`."""
    arrays: dict[str, Array] = {
        "slot": np.full(2, value, np.int64),
        "row_context": np.full((3, 1), value, np.int64),
        "timestep": np.full(3, value, np.float32),
        "coef": np.full((2, LANES, TERMS), value, np.float32),
    }
    if noise:
        arrays["noise"] = np.full((2, *LATENT), value, np.float32)
    return Plan((), RowLayout((), 3, StepShape(2, 3, 1), {}, ()), (), arrays)


@pytest.mark.parametrize("first_draws", [False, True])
def test_plans_of_one_shape_share_their_memory_whoever_draws_noise(*, first_draws: bool) -> None:
    device = OnnxRuntimeDevice(threads=1)
    stream = device.stream("steps")
    memory = PlanMemory(device, plan(0, noise=first_draws), LATENT)
    noise = 0.0
    for value, draws in ((1.0, first_draws), (2.0, not first_draws), (3.0, first_draws)):
        given = plan(value, noise=draws)
        memory.write(given, stream)
        noise = value if draws else noise
        for name, array in {**given.arrays, "noise": np.full((2, *LATENT), noise, np.float32)}.items():
            np.testing.assert_array_equal(stream.read(memory.buffers[name]).result(), array, err_msg=name)
