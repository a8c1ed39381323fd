"""Runs single steps of a bundle on a backend, with as many LoRAs as one likes."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.lora.results import Ranks, StepTimes, TimedSteps
from engines.backends.device import Buffer, Device, Engine
from engines.backends.registry import ON_CPU, open_device
from engines.contract import (
    LORA_GRAPHS,
    LORA_POOL,
    Array,
    Arrays,
    GraphName,
    Port,
    build_inputs,
    random_values,
)
from engines.errors import EngineError
from engines.manifest import LoraCapacity, Manifest, Size
from engines.row_buckets import rank_buckets

PLAIN: GraphName = "denoise"
_WARM_UP = 3  # launches: one is direct, one is captured, one replays, where calls are captured
_BLOCK = 1 << 20  # values that are drawn, and repeated over the whole pool


def capacity_of(manifest: Manifest) -> LoraCapacity:
    """Raises EngineError for a bundle without graphs for LoRAs."""
    if manifest.lora is None:
        raise EngineError(f"{manifest.name} has no graphs for LoRAs: build it with --lora-slots 8.")
    return manifest.lora


def ranks_per_row(ranks: Ranks, capacity: LoraCapacity, *, pads: bool) -> int:
    """A: the most ranks of any row, or the bucket that they are padded to."""
    most = max(ranks)
    return next(bucket for bucket in rank_buckets(capacity) if bucket >= most) if pads else most


def step_inputs(manifest: Manifest, size: Size, *, images: int, ranks: Ranks, pads: bool = False) -> dict[str, Array]:
    """The inputs of a step of guided images, random but in range; `LORA_POOL` is left out.

    Image i has the LoRA of `ranks[i]`; images beyond those have none.
    """
    graph = LORA_GRAPHS[PLAIN] if ranks else PLAIN
    ports = [port for port in manifest.inputs(graph) if port != LORA_POOL]
    sizes = step_sizes(manifest, size, images=images, ranks=ranks, pads=pads)
    values = _lora_values(ranks, sizes) if ranks else {}
    return build_inputs(ports, sizes, values, make=random_values(np.random.default_rng(0)))


def step_sizes(manifest: Manifest, size: Size, *, images: int, ranks: Ranks, pads: bool) -> dict[str, int]:
    """The size of every dimension; pools are as a server has them."""
    capacity = capacity_of(manifest)
    sizes = {
        **manifest.dims(size),
        "S": max(manifest.slots, images + 1),
        "C": max(manifest.context_rows, 2 * images),
        "B": images,
        "R": 2 * images,
        "L": 1,
    }
    if pads:  # as many images as rows, of which the second half is padding
        sizes["B"] = 2 * images
    return sizes | {"Q": capacity.pool_rows, "A": ranks_per_row(ranks, capacity, pads=pads)} if ranks else sizes


def _lora_values(ranks: Ranks, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Each LoRA has ranks of its own in the pool, and updates both rows of its image."""
    index = np.zeros((sizes["R"], sizes["A"]), np.int64)
    weight = np.zeros((sizes["R"], sizes["A"]), np.float32)
    begin = 0
    for image, rank in enumerate(ranks):
        rows = slice(2 * image, 2 * image + 2)
        index[rows, :rank] = np.arange(begin, begin + rank)
        weight[rows, :rank] = 1 / rank
        begin += rank
    return {"row_lora": index, "lora_weight": weight}


def random_pool(ranks: int, width: int) -> Array:
    """[ranks, width], f16. Values repeat, which changes no time: drawing a gigabyte takes longer than all steps."""
    block = np.random.default_rng(1).normal(0, 0.02, min(_BLOCK, ranks * width)).astype(np.float16)
    return np.resize(block, (ranks, width))


class Steps:
    """Steps of guided images of one size, on one device."""

    def __init__(
        self, bundle: Path, backend: str, *, size: Size, images: int, threads: int = 0, one_graph: bool = False
    ) -> None:
        """`one_graph`: only the graph that runs is in memory.

        Raises EngineError where the backend does not run here, or the bundle has no engines for it.
        """
        self.manifest = manifest = Manifest.read(bundle)
        self.device: Device = open_device(backend, threads=threads)
        self.size, self.images = size, images
        self._stream = self.device.stream("steps", urgent=True)
        self._files = {name: bundle / path for name, path in _paths(manifest, backend).items()}
        self._one_graph = one_graph
        self._engines: dict[GraphName, Engine] = {}
        self._buffers: dict[tuple[str, tuple[int, ...]], Buffer] = {}

    def times(self, ranks: Ranks, count: int) -> tuple[float, ...]:
        """Seconds of each of `count` steps on the device, warmed up. Raises EngineError."""
        graph = LORA_GRAPHS[PLAIN] if ranks else PLAIN
        inputs = step_inputs(self.manifest, self.size, images=self.images, ranks=ranks, pads=self.device.pads)
        call = self._engine(graph).bind(self._bound(graph, inputs, ranks))
        for _ in range(_WARM_UP if self.device.pads else 1):
            call.launch()
        seconds = []
        for _ in range(count):
            begin = self._stream.record(timed=True)
            call.launch()
            end = self._stream.record(timed=True)
            end.wait()
            seconds.append(end.seconds_since(begin))
        return tuple(seconds)

    def _engine(self, graph: GraphName) -> Engine:
        if graph not in self._engines:
            if self._one_graph:
                self._engines.clear()
                gc.collect()
            self._engines[graph] = self.device.load(self._files[graph], self._stream)
        return self._engines[graph]

    def _bound(self, graph: GraphName, inputs: Arrays, ranks: Ranks) -> dict[str, Buffer]:
        """A buffer for each input, filled, and for each output."""
        sizes = step_sizes(self.manifest, self.size, images=self.images, ranks=ranks, pads=self.device.pads)
        bound = {name: self._buffer(name, array.shape, array.dtype.name) for name, array in inputs.items()}
        for name, array in inputs.items():
            self._stream.write(bound[name], array)
        outputs = {
            port.name: self._buffer(port.name, port.shape(sizes), port.dtype) for port in self.manifest.outputs(graph)
        }
        pool = {LORA_POOL.name: self._pool(LORA_POOL, sizes)} if ranks else {}
        return {**bound, **outputs, **pool}

    def _pool(self, port: Port, sizes: Mapping[str, int]) -> Buffer:
        shape, known = port.shape(sizes), len(self._buffers)
        buffer = self._buffer(port.name, shape, port.dtype)
        if len(self._buffers) > known:
            self._stream.write(buffer, random_pool(*shape))
        return buffer

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: str) -> Buffer:
        """The buffer of that name and shape, which calls share."""
        if (name, shape) not in self._buffers:
            self._buffers[name, shape] = self.device.allocate(shape, dtype)
        return self._buffers[name, shape]


def _paths(manifest: Manifest, backend: str) -> dict[GraphName, str]:
    """The files of the step graphs. Raises EngineError without a build for the backend, where it needs one."""
    graphs = (PLAIN, LORA_GRAPHS[PLAIN])
    capacity_of(manifest)
    if build := manifest.builds.get(backend):
        return {graph: build.engines[graph].files[0].path for graph in graphs}
    if backend in ON_CPU:
        return {graph: manifest.graphs[graph].onnx["fp32"].files[0].path for graph in graphs}
    raise EngineError(f"{manifest.name} is not built for {backend}: build it with --backend {backend}.")


def time_steps(steps: Steps, backend: str, cases: Sequence[Ranks], *, rounds: int, count: int) -> TimedSteps:
    """`count` steps of every case in each round; what a machine does otherwise meets all cases alike."""
    every: tuple[Ranks, ...] = ((), *cases)
    found: dict[Ranks, list[tuple[float, ...]]] = {ranks: [] for ranks in every}
    for _ in range(rounds):
        for ranks in every:
            found[ranks].append(steps.times(ranks, count))
    return TimedSteps(
        backend=backend,
        device=steps.device.name,
        size=str(steps.size),
        rows=2 * steps.images,
        steps=tuple(StepTimes(ranks=ranks, rounds=tuple(times)) for ranks, times in found.items()),
    )


def cases_of(capacity: LoraCapacity, *, loras: Sequence[int], ranks: Sequence[int], images: int) -> list[Ranks]:
    """As many LoRAs as named, of each rank, and once of all these ranks at a time; what the pool has no place for is
    left out.
    """
    wanted = [(rank,) * count for rank in ranks for count in loras]
    mixed = tuple(ranks[index % len(ranks)] for index in range(max(loras)))
    cases = dict.fromkeys([*wanted, mixed])
    return [case for case in cases if fits(case, capacity) and len(case) <= images]


def fits(case: Ranks, capacity: LoraCapacity) -> bool:
    """Whether the pool holds these LoRAs, and the graphs take each of them."""
    return max(case) <= capacity.rank and sum(case) <= capacity.ranks
