"""Measures each system in turn, and saves what is found at once."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import PIL.Image

from benchmarks.peers.pipelines.artifacts import ArtifactBuilder, for_size
from benchmarks.peers.pipelines.report import page
from benchmarks.peers.pipelines.results import Measurement, PipelineResults
from benchmarks.peers.pipelines.runners import ImageTask, PipelineRunner, ServerRunner, SystemRunner
from benchmarks.peers.pipelines.systems import EAGER, TITLES, System
from engines.errors import EngineError
from engines.files import write_atomically
from loadtest.provenance import now

_WARM_UP = "a photograph", 1_000_000, 1  # prompt, seed, steps

Due = tuple[System, str, int]  # size, round


class PipelineComparison:
    """Measures systems one after the other, each in a process of its own."""

    def __init__(self, out: Path, results: PipelineResults, builder: ArtifactBuilder, *, python: str) -> None:
        """`python` is the interpreter of pipelines that need packages we do not have."""
        self.results = results
        self._out, self._builder, self._python = out, builder, python

    def due(self, systems: tuple[System, ...]) -> list[Due]:
        """What is not measured yet: small images first, and each round with all systems."""
        settings = self.results.settings
        rounds = product(settings.sizes, range(settings.rounds), systems)
        return [(system, size, number) for size, number, system in rounds if not self._has(system, size, number)]

    def measure(self, system: System, size: str, number: int) -> Measurement:
        """Measure a system at a size, and save the result; where it fails, with a note that says why."""
        found = Measurement(system=system.name, size=size, round=number, run=len(self.results.runs) - 1)
        try:
            found = self._measure(system, found)
        except EngineError as error:
            found = found.model_copy(update={"note": str(error)})
        self.results.put(found)
        self.save()
        return found

    def save(self) -> None:
        self.results.runs[-1] = self.results.runs[-1].model_copy(update={"ended": now()})
        write_atomically(self._out / "peers.json", self.results.model_dump_json(indent=1).encode())
        write_atomically(self._out / "peers.md", page(self.results, TITLES).encode())

    def _has(self, system: System, size: str, number: int) -> bool:
        found = self.results.find((system.name, size, number))
        return found is not None and bool(found.seconds)

    def _measure(self, system: System, begun: Measurement) -> Measurement:
        settings, images = self.results.settings, self._images(system.name, begun.size)
        images.mkdir(parents=True, exist_ok=True)

        def task(prompt: str, seed: int, steps: int) -> ImageTask:
            return ImageTask(prompt, seed, steps, _pixels(begun.size), settings.guidance, images / f"{seed}.png")

        artifact = self._builder.artifact_of(system)
        with self._started(system, artifact, begun) as runner:
            warm_up = runner.generate(task(*_WARM_UP))
            seconds = []
            for k in range(settings.repeats):
                prompt = settings.prompts[k % len(settings.prompts)]
                seconds.append(runner.generate(task(prompt, k, settings.sizes[begun.size])))
            peak = runner.close()
        if system.name == EAGER and settings.repeats > 1:
            self.results.seed_difference[begun.size] = _squared_error(images / "0.png", images / "1.png")
        found = {"startup": runner.startup, "warm_up": warm_up, "seconds": tuple(seconds), "peak_bytes": peak}
        return begun.model_copy(update={**found, "errors": self._errors(system, begun.size)})

    @contextmanager
    def _started(self, system: System, artifact: Path, begun: Measurement) -> Iterator[SystemRunner]:
        log = self._out / "logs" / f"{system.name}-{begun.size}-{begun.round}.log"
        with tempfile.TemporaryDirectory() as folder:
            runner = self._start(system, artifact, begun.size, log, Path(folder))
            try:
                yield runner
            finally:
                runner.close()

    def _start(self, system: System, artifact: Path, size: str, log: Path, folder: Path) -> SystemRunner:
        settings = self.results.settings
        if system.kind == "server":
            bundle = for_size(artifact, size, folder)
            return ServerRunner(bundle, system.backend, log, threads=settings.threads, fields=system.fields)
        width, height = _pixels(size)
        spec = {"kind": system.kind, "model": str(artifact.resolve()), "width": width, "height": height}
        spec |= {"threads": settings.threads, "guidance": settings.guidance, "force_fp32": system.force_fp32}
        # An empty folder for torch.compile: it compiles anew each time, as on a machine that never did.
        variables = {"OMP_NUM_THREADS": str(settings.threads), "TORCHINDUCTOR_CACHE_DIR": str(folder)}
        python = self._python if system.packages else sys.executable
        return PipelineRunner(python, spec, log, variables=variables)

    def _errors(self, system: System, size: str) -> tuple[float, ...]:
        """Mean squared difference of each image from torch-eager's; empty where there is nothing to compare with."""
        if not system.comparable or system.name == EAGER:
            return ()
        own, reference = self._images(system.name, size), self._images(EAGER, size)
        names = [f"{k}.png" for k in range(self.results.settings.repeats)]
        return tuple(_squared_error(own / name, reference / name) for name in names if (reference / name).exists())

    def _images(self, name: str, size: str) -> Path:
        return self._out / "pictures" / size / name


def _pixels(size: str) -> tuple[int, int]:
    width, height = map(int, size.split("x"))
    return width, height


def _squared_error(one: Path, other: Path) -> float:
    """Mean squared difference of two images, of colours 0 to 255."""
    a, b = (np.asarray(PIL.Image.open(path).convert("RGB"), np.float64) for path in (one, other))
    return float(np.mean((a - b) ** 2))
