"""One bisection: the rounds of measurements, and the neighbourhood of what they end at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from engines.build.bisect.finding import Finding, Reading, Row, advice_for, vanished
from engines.build.bisect.graph import Graph
from engines.build.bisect.measure import MarkedEngine
from engines.build.bisect.search import MARKS, first_divergent
from engines.contract import GraphName
from engines.manifest import Precision


class Case(NamedTuple):
    """What is bisected, and on which inputs."""

    graph: GraphName
    backend: str
    precision: Precision
    inputs: str  # for people


class _Vanished(Exception):
    """Everything agrees, in an engine that strays without the marks."""


def locate(engine: MarkedEngine, graph: Graph, counterparts: Mapping[str, str], case: Case) -> Finding:
    """The first tensor of `engine` that differs from FP32, and those around it. Raises EngineError."""
    tensors = [name for name in graph.tensors() if name in counterparts]
    ancestors = graph.ancestors(tensors)
    rounds = _Rounds(engine, graph)
    try:
        found = first_divergent(ancestors, rounds.differing_outputs(), rounds)
        while True:
            near = graph.around(found, tensors)
            closest = [name for index, name in enumerate(ancestors) if ancestors[found] >> index & 1][-MARKS:-1]
            readings = rounds.read(list(dict.fromkeys((*closest, *near))))
            if not (earlier := [name for name in closest if not readings[name].passed]):
                break
            found = earlier[0]  # which a larger sum behind it hid
    except _Vanished:
        return Finding(case.graph, case.backend, case.inputs, None, (), vanished(case.backend), rounds.count)
    places = graph.places()
    rows = tuple(Row(places[name], readings[name]) for name in near)
    advice = advice_for(
        case.backend, case.precision, readings[found], [readings[name] for name in near[: near.index(found)]]
    )
    return Finding(case.graph, case.backend, case.inputs, places[found], rows, advice, rounds.count)


class _Rounds:
    """Reads the tensors of each round, and counts the rounds."""

    def __init__(self, engine: MarkedEngine, graph: Graph) -> None:
        self._engine = engine
        self._graph = graph
        self.count = 0

    def differing_outputs(self) -> list[str]:
        """Of an engine without marks."""
        return [name for name, agrees in self(()).items() if not agrees]

    def __call__(self, tensors: Sequence[str]) -> dict[str, bool]:
        """Which tensors agree, and which outputs. Whole numbers that agree say nothing of what they are made of."""
        readings = self.read(tensors).items()
        return {name: one.passed for name, one in readings if self._graph.is_float(name) or not one.passed}

    def read(self, tensors: Sequence[str]) -> dict[str, Reading]:
        """Raises _Vanished where all outputs and all of `tensors` agree."""
        self.count += 1
        readings = self._engine.read(tensors)
        if all(reading.passed for reading in readings.values()):
            raise _Vanished
        return readings
