"""How a plan's arrays reach the device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from engines import contract
from engines.backends.device import Buffer, Call, Device, Stream
from engines.backends.host import HostReading, HostStream
from engines.backends.onnxruntime import OnnxRuntimeDevice
from engines.contract import GRAPHS, LANES, LORA_POOL, STEPS, TERMS, Array, GraphName, Port, inputs_of
from engines.manifest import Manifest
from server.requests.depths import DEPTHS, Depth
from server.runtime.pipeline.latent_pool import LatentPool, PlanMemory, features_bytes
from server.runtime.pipeline.plan import Plan, RowLayout, StepShape, make_plan
from server.runtime.pipeline.streams import Streams
from tests import ROOT
from tests.support.contracts import with_inputs

LATENT = (4, 8, 8)
SIZES = {"B": 2, "R": 3, "L": 1, "c": 4, "h": 8, "w": 8}


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
    return Plan((), RowLayout((), 3, StepShape(2, 3, 1), {}, ()), arrays)


@pytest.mark.parametrize("first_draws", [False, True])
def test_plans_of_one_shape_share_their_memory_whichever_draws_noise(*, first_draws: bool) -> None:
    device = OnnxRuntimeDevice(threads=1)
    stream = device.stream("steps")
    memory = PlanMemory(device, inputs_of("denoise"), SIZES)
    noise = 0.0
    for value, draws in ((1.0, first_draws), (2.0, not first_draws), (3.0, first_draws)):
        given = plan(value, noise=draws)
        memory.write(given, stream)
        noise = value if draws else noise
        for name, array in {**given.arrays, "noise": np.full((2, *LATENT), noise, np.float32)}.items():
            np.testing.assert_array_equal(stream.read(memory.buffers[name]).result(), array, err_msg=name)


def test_inputs_that_plans_do_not_give_stay_neutral() -> None:
    device = OnnxRuntimeDevice(threads=1)
    stream = device.stream("steps")
    scale = Port("adapter_scale", "float32", ("R", 2), role="plan", fill=1)
    memory = PlanMemory(device, (*inputs_of("denoise_shallow"), scale), SIZES)
    for _ in range(2):
        memory.write(plan(5, noise=False), stream)
        np.testing.assert_array_equal(stream.read(memory.buffers["adapter_scale"]).result(), np.ones((3, 2)))
        np.testing.assert_array_equal(stream.read(memory.buffers["row_feature"]).result(), np.zeros(3))


def test_a_plan_gives_only_inputs_of_the_graph() -> None:
    device = OnnxRuntimeDevice(threads=1)
    memory = PlanMemory(device, inputs_of("denoise"), SIZES)
    unknown = plan(1, noise=False)
    unknown.arrays["row_feature"] = np.zeros(3, np.int64)
    with pytest.raises(KeyError, match="row_feature"):
        memory.write(unknown, device.stream("steps"))


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Manifest.read(ROOT / "engines" / "demo")


def test_a_preview_reads_one_lane_and_staging_copies_one(manifest: Manifest) -> None:
    device, copied = OnnxRuntimeDevice(threads=1), list[tuple[int, ...]]()

    class Watched(HostStream):
        """Notes the shape of what it copies and reads."""

        def copy(self, source: Buffer, to: Buffer, *, source_at: int | None = None, at: int | None = None) -> None:
            copied.append(source.shape[1:])
            super().copy(source, to, source_at=source_at, at=at)

        def read(self, buffer: Buffer, *, at: int | None = None) -> HostReading:
            copied.append(buffer.shape[1:])
            return super().read(buffer, at=at)

    stream = Watched(urgent=False)
    pool = make_pool(manifest, device, stream, {name: Recorder() for name in GRAPHS})
    slots = [pool.take_slot(np.full(pool.latent_shape, value, np.float32)) for value in (1, 2)]
    lanes = np.arange(LANES).reshape(LANES, 1, 1, 1)
    for slot in slots:
        stream.write(
            pool._states[pool._parity], np.broadcast_to(10 * slot + lanes, (LANES, *pool.latent_shape)), at=slot
        )
    (x0,) = {float(value) for value in pool.read_x0(slots[1]).result().flat}
    assert x0 == 10 * slots[1] + LANES - 1
    entries = pool.stage(slots)
    assert copied == [pool.latent_shape] * 3
    staged = stream.read(pool._staging).result()
    assert [float(staged[entry, 0].mean()) for entry in entries] == [10 * slot for slot in slots]
    assert pool.staged == 2
    pool.free_entries(entries)
    assert pool.staged == 0


class Recorder:
    """An engine that computes nothing, and remembers its buffers."""

    def __init__(self) -> None:
        self.bound: list[Mapping[str, Buffer]] = []

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        self.bound.append(buffers)
        return self

    def launch(self) -> None: ...


def make_pool(manifest: Manifest, device: Device, stream: Stream, engines: Mapping[GraphName, Recorder]) -> LatentPool:
    context = device.allocate((manifest.context_rows, manifest.context.tokens, manifest.context.width), np.float32)
    return LatentPool(
        manifest.resolutions[0],
        manifest,
        engines=engines,
        device=device,
        streams=Streams(stream, stream, stream),
        pools={"context": context, LORA_POOL.name: device.allocate((6, 8), np.float16)},
        made_features=device.allocate((features_bytes(manifest),), np.uint8),
        decode_chunk=1,
    )


@pytest.mark.parametrize("depth", ["full", "shallow"])
def test_memory_follows_the_inputs_that_are_declared(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, depth: Depth
) -> None:
    """A pool and an input of the plan that no plan fills are bound, at their neutral values."""
    scale = Port("row_scale", "float32", ("R", 2), role="plan", fill=1)
    control = Port("control", "float32", ("S", "c", "h", "w"), role="pool", fill=0.5)
    for graph in STEPS:
        monkeypatch.setitem(contract.INPUTS, graph, (*contract.INPUTS[graph], scale, control))
    declared, device = with_inputs(manifest, scale, control), OnnxRuntimeDevice(threads=1)
    stream = device.stream("all")
    engines: dict[GraphName, Recorder] = {name: Recorder() for name in GRAPHS}
    pool = make_pool(declared, device, stream, engines)
    pool.step(make_plan((), pool.latent_shape, shape=StepShape(2, 4, 1, depth), spare=pool.spare))
    graph = STEPS[DEPTHS.index(depth)]
    there, back = engines[graph].bound
    for bound in (there, back):
        ports = (*inputs_of(graph), *contract.OUTPUTS[graph])
        assert bound.keys() == {port.name for port in ports}
        np.testing.assert_array_equal(stream.read(bound["row_scale"]).result(), np.ones((4, 2)))
        filled = stream.read(bound["control"]).result()
        np.testing.assert_array_equal(filled, np.full((declared.slots, *pool.latent_shape), 0.5))
    assert there["state"] is back["state_next"]
    assert there["state_next"] is back["state"]
