"""Chooses the fastest of several backends: each is measured at the first start, and the result is cached.

Each runs in a process of its own, so the server loads only the chosen one, the memory of the others is freed, and a
crash of one only rules it out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from engines.backends import cores
from engines.backends.available import installed
from engines.backends.registry import open_device
from engines.contract import DecoderName
from engines.errors import EngineError
from engines.files import write_atomically
from engines.manifest import Manifest, Size
from server.runtime.batching.step_times import Kind, StepTimeModel
from server.runtime.failures import StartStopped
from server.runtime.monitoring.trace import Trace
from server.runtime.pipeline.pieces import at_once
from server.runtime.pipeline.pipeline import Pipeline
from server.runtime.pipeline.streams import Streams

_log = logging.getLogger(__name__)
_POLL = 0.1  # seconds between checks of whether to stop
_RUNS, _ENOUGH = 5, 0.5  # a backend's process measures so often, unless so many seconds have gone by

OnStatus = Callable[[str], None]


class MeasuringStopped(StartStopped):
    """The server was stopped before it knew which backend to serve with."""


def choose_fastest(
    manifest: Manifest,
    bundle: Path,
    backends: Sequence[str],
    *,
    threads: int,
    on_status: OnStatus,
    stopped: Callable[[], bool] = lambda: False,
) -> str:
    """The one of `backends` that generates an image with the verified bundle in folder `bundle` in the least time.

    Without a cached result for this bundle on this machine, each is measured twice, which `on_status` reports.

    Raises:
        EngineError: none of them runs.
        MeasuringStopped: `stopped`, which is polled ten times a second, returned True.
    """
    if len(backends) == 1:
        return backends[0]
    file = _cache_file(_key(manifest, backends, threads))
    seconds = _read_cache(file, backends) if file else None
    source = f"remembered in {file}"
    if seconds is None:
        rounds = _measure_rounds(bundle, backends, threads=threads, on_status=on_status, stopped=stopped)
        ran = [backend for backend in backends if backend in rounds[-1]]
        seconds = {backend: min(one[backend] for one in rounds) for backend in ran}
        if len(seconds) < len(backends):
            source = "not remembered"
        elif len({_fastest_of(one) for one in rounds}) > 1:
            source = "not remembered (two rounds disagree: they are close, or this machine is busy)"
        else:
            source = _write_cache(file, seconds)
    chosen = _fastest_of(seconds)
    figures = ", ".join(f"{backend} {taken:.3g} s" for backend, taken in seconds.items())
    _log.info("backend %s: an image takes %s, measured on this machine and %s", chosen, figures, source)
    return chosen


def _fastest_of(seconds: Mapping[str, float]) -> str:
    return min(seconds, key=lambda backend: seconds[backend])


def _measure_rounds(
    bundle: Path, backends: Sequence[str], *, threads: int, on_status: OnStatus, stopped: Callable[[], bool]
) -> list[dict[str, float]]:
    """Two rounds, the second in reverse order: a disturbance of the first may have ended by then."""
    first = _measure_round(bundle, backends, threads=threads, on_status=on_status, stopped=stopped)
    if len(first) == 1:
        return [first]
    return [first, _measure_round(bundle, [*first][::-1], threads=threads, on_status=on_status, stopped=stopped)]


def _measure_round(
    bundle: Path, backends: Sequence[str], *, threads: int, on_status: OnStatus, stopped: Callable[[], bool]
) -> dict[str, float]:
    """The seconds of each that runs. Raises EngineError where none does."""
    seconds: dict[str, float] = {}
    reasons: list[str] = []
    for backend in backends:
        on_status(f"measuring {backend}, once for this machine")
        try:
            seconds[backend] = _measure_in_process(bundle, backend, threads=threads, stopped=stopped)
        except MeasuringStopped:
            raise
        except EngineError as error:
            _log.warning("backend %s is passed over: %s", backend, error)
            reasons.append(f"{backend}: {error}")
    if not seconds:
        raise EngineError(f"No backend runs this bundle here ({'; '.join(reasons)}).")
    return seconds


def _measure_in_process(bundle: Path, backend: str, *, threads: int, stopped: Callable[[], bool]) -> float:
    """Measure in another process. Raises EngineError if that fails."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}  # imports what we do
    command = [sys.executable, "-P", "-m", __name__, str(bundle), backend, str(threads)]
    with subprocess.Popen(  # noqa: S603 - our own command
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        process_group=0,  # a terminal's Ctrl-C is for the server, which ends the child
    ) as child:
        try:
            output, errors = _output_of(child, stopped)
        finally:
            child.kill()
    if child.returncode:
        lines = errors.strip().splitlines() or [f"its process ended with {child.returncode}"]
        raise EngineError(lines[-1])
    return float(output.splitlines()[-1])


def _output_of(child: subprocess.Popen[str], stopped: Callable[[], bool]) -> tuple[str, str]:
    """The output of the child, once it has ended."""
    while True:
        try:
            return child.communicate(timeout=_POLL)
        except subprocess.TimeoutExpired:
            if stopped():
                raise MeasuringStopped("The server was stopped while it measured its backends.") from None


class _Shortest(StepTimeModel):
    """The shortest step and ends that were observed: what else the machine does only ever makes them longer."""

    step = end = math.inf  # seconds

    def observe(self, kind: Kind, rows: int, seconds: float) -> None:
        super().observe(kind, rows, seconds)
        if kind[1] == "full":
            self.step = min(self.step, seconds)

    def observe_encode_decode(
        self, size: Size, seconds: float, *, init_image: float = 0.0, decoder: DecoderName = "vae"
    ) -> None:
        super().observe_encode_decode(size, seconds, init_image=init_image, decoder=decoder)
        if decoder == "vae":
            self.end = min(self.end, seconds)


def seconds_of_picture(bundle: Path, backend: str, *, threads: int) -> float:
    """The seconds of one image alone, at the default size and steps. Raises EngineError if it cannot be loaded."""
    manifest = Manifest.read(bundle)
    alone = manifest.model_copy(update={"resolutions": manifest.resolutions[:1], "rows": manifest.rows[:1]})
    step_times = _Shortest(max_rows=alone.max_rows)
    device = open_device(backend, threads=threads)
    loading = Pipeline.load(
        alone,
        bundle,
        backend=backend,
        device=device,
        streams=Streams.open(device, "equal"),
        step_times=step_times,
        trace=Trace(),
        step_cache=False,
    )
    pipeline = at_once(loading)
    began = time.monotonic()
    for _ in range(_RUNS):
        at_once(pipeline.warm_up(lambda _stage: None))
        if time.monotonic() - began > _ENOUGH:
            break
    return step_times.step * manifest.defaults.num_inference_steps + step_times.end


# --- what is remembered


def _key(manifest: Manifest, backends: Sequence[str], threads: int) -> str:
    """A hash over all that decides which is the fastest."""
    builds = {backend: manifest.builds.get(backend) for backend in backends}
    facts = {
        "model": manifest.export_key,
        "engines": {name: [one.key for one in build.engines.values()] for name, build in builds.items() if build},
        "versions": {backend: installed(backend) for backend in backends},
        "size": str(manifest.resolutions[0]),
        "rows": manifest.rows[0],
        "steps": manifest.defaults.num_inference_steps,
        "processor": [cores.name(), os.cpu_count(), cores.limit(), threads],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _cache_file(key: str) -> Path | None:
    """The file for what was measured under `key`; None for a user without a home."""
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return caches / "latentd" / f"fastest-{key[:24]}.json"


def _read_cache(file: Path, backends: Sequence[str]) -> dict[str, float] | None:
    """Seconds by backend; None unless the file is there and is as we write it."""
    try:
        output = json.loads(file.read_bytes())
        seconds = {backend: float(output[backend]) for backend in backends}
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return seconds if all(math.isfinite(taken) and taken > 0 for taken in seconds.values()) else None


def _write_cache(file: Path | None, seconds: Mapping[str, float]) -> str:
    """Write it down, for later starts; returns what came of it, in words."""
    if file is None:
        return "not remembered (this user has no home, and XDG_CACHE_HOME is not set)"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(seconds).encode())
    except OSError as error:
        return f"not remembered ({error.strerror}: {file.parent}; XDG_CACHE_HOME says where)"
    return f"remembered in {file}"


def main() -> int:
    threading.Thread(target=_end_with, args=(os.getppid(),), name="parent", daemon=True).start()
    bundle, backend, threads = sys.argv[1:]
    try:
        sys.stdout.write(f"{seconds_of_picture(Path(bundle), backend, threads=int(threads))}\n")
    except EngineError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _end_with(parent: int) -> None:
    """End when the server is gone, which may have been killed."""
    while os.getppid() == parent:
        time.sleep(_POLL)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
