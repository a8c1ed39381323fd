"""Contestants as processes: a pipeline, or our server; and the most memory that each ever had."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from engines.errors import EngineError

ROOT = Path(__file__).parents[2]
_LOOK = 0.2  # seconds between looks at the memory
_COMPLAINTS = 4  # lines of a log: the first of them tends to be the cause
_PATIENCE = 1800.0  # seconds that an answer may take
_LEAVE = 30.0  # seconds to end in order
_READY = re.compile(r"is ready: open (http://\S+)")
_HIGH_WATER = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)
_TELLING = re.compile(r"error|cannot|failed|wrong", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Wish:
    """One picture."""

    prompt: str
    seed: int
    steps: int
    size: tuple[int, int]  # width, height
    guidance: float
    out: Path  # where the PNG goes


class Running(Protocol):
    """A contestant that is ready. Closed, it tells its peak memory."""

    startup: float  # seconds from starting the process to being ready

    def draw(self, wish: Wish) -> float:
        """Write the picture; returns the seconds from asking for it to having it. Raises EngineError."""

    def close(self) -> int:
        """End the process; returns the most bytes of memory that it and its children had together."""


class Watched:
    """A process whose memory is watched, and whose complaints go to a file. Killed where it does not answer."""

    def __init__(
        self, command: Sequence[str], log: Path, *, variables: Mapping[str, str] | None = None, spoken_to: bool = False
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.began = time.perf_counter()
        pipe = subprocess.PIPE if spoken_to else None
        with log.open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(  # noqa: S603 - our own command
                command,
                cwd=ROOT,
                env={**os.environ, **(variables or {})},
                stdin=pipe,
                stdout=pipe,
                stderr=errors,
                text=True,
            )
        self._peak = 0
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def say(self, line: str) -> None:
        """To one that is spoken to. Raises BrokenPipeError where it has ended."""
        if self.process.stdin:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()

    def hear(self) -> str:
        """Its next line; an empty one where it has ended, of itself or because it took too long."""
        impatience = threading.Timer(_PATIENCE, self.process.kill)
        impatience.start()
        line = self.process.stdout.readline() if self.process.stdout else ""
        impatience.cancel()
        return line

    def end(self) -> int:
        """Stop it, if it has not ended by itself; returns its peak memory in bytes."""
        self._peak = max(self._peak, memory_of(self.process.pid))
        if self.process.stdin:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        else:
            self.process.terminate()
        try:
            self.process.wait(_LEAVE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self._over.set()
        self._watch.join()
        return self._peak

    def complaint(self) -> str:
        """The line of its log that tells most."""
        return complaint_in(self.log.read_text(encoding="utf-8", errors="replace"))

    def _look(self) -> None:
        while not self._over.wait(_LOOK):
            self._peak = max(self._peak, memory_of(self.process.pid))


class Pipeline:
    """`benchmarks.peers.pipeline_process` under an interpreter. Raises EngineError where it cannot load its model."""

    def __init__(self, python: str, spec: Mapping[str, Any], log: Path, *, variables: Mapping[str, str]) -> None:
        command = [python, "-m", "benchmarks.peers.pipeline_process", json.dumps(spec)]
        self._watched = Watched(command, log, variables=variables, spoken_to=True)
        with _ended_on_error(self._watched):
            self._answer()
        self.startup = time.perf_counter() - self._watched.began

    def draw(self, wish: Wish) -> float:
        asked = {"prompt": wish.prompt, "seed": wish.seed, "steps": wish.steps, "out": str(wish.out)}
        with suppress(BrokenPipeError):  # it has ended, which its answer tells better
            self._watched.say(json.dumps(asked))
        return float(self._answer()["seconds"])

    def close(self) -> int:
        return self._watched.end()

    def _answer(self) -> dict[str, Any]:
        line = self._watched.hear()
        if not line:
            raise EngineError(f"it ended without an answer: {self._watched.complaint()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise EngineError(f"{answer['failed']} (its log: {self._watched.complaint()})")
        return answer


class Server:
    """`python -m server`, asked over HTTP for one picture at a time. Raises EngineError where it does not start."""

    def __init__(self, bundle: Path, backend: str, log: Path, *, threads: int, fields: Mapping[str, Any]) -> None:
        words = ["--bundle", str(bundle), "--backend", backend, "--threads", str(threads), "--port", "0"]
        self._watched = Watched([sys.executable, "-m", "server", *words], log)
        self._fields = fields
        with _ended_on_error(self._watched):
            url = self._wait()
        self.startup = time.perf_counter() - self._watched.began
        self._http = httpx.Client(base_url=url, timeout=_PATIENCE, trust_env=False)

    def draw(self, wish: Wish) -> float:
        width, height = wish.size
        body = {
            "prompt": wish.prompt,
            "prompt_syntax": "plain",  # as diffusers reads it
            "seed": wish.seed,
            "num_inference_steps": wish.steps,
            "width": width,
            "height": height,
            "guidance_scale": wish.guidance,
            "scheduler": "euler",
            "timestep_spacing": "linspace",
            **self._fields,
        }
        began = time.perf_counter()
        try:
            reply = self._http.post("/generate", json=body, headers={"Accept": "image/png"})
        except httpx.HTTPError as error:
            raise EngineError(f"{type(error).__name__}: {error}") from None
        seconds = time.perf_counter() - began
        if reply.status_code != 200:
            raise EngineError(f"the server answered {reply.status_code}: {_problem(reply)}")
        wish.out.write_bytes(reply.content)
        return seconds

    def close(self) -> int:
        self._http.close()
        return self._watched.end()

    def _wait(self) -> str:
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            if found := _READY.search(self._watched.log.read_text(encoding="utf-8", errors="replace")):
                return found[1]
            if self._watched.process.poll() is not None:
                raise EngineError(f"the server did not start: {self._watched.complaint()}")
            time.sleep(0.05)
        raise EngineError(f"the server was not ready after {_PATIENCE:.0f} s.")


@contextmanager
def _ended_on_error(watched: Watched) -> Iterator[None]:
    try:
        yield
    except BaseException:
        watched.end()
        raise


def memory_of(pid: int) -> int:
    """The sum of the peaks of a process and of those of its children that live, in bytes."""
    return sum(_high_water(one) for one in _family(pid, dict(_parents())))


def _family(pid: int, parents: Mapping[int, int]) -> set[int]:
    found = {pid}
    while grown := {child for child, parent in parents.items() if parent in found} - found:
        found |= grown
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            # The name stands in brackets, and may have blanks and brackets itself.
            yield int(path.parent.name), int(path.read_text(errors="replace").rpartition(")")[2].split()[1])


def _high_water(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return 0
    found = _HIGH_WATER.search(status)
    return int(found[1]) * 1024 if found else 0


def complaint_in(log: str) -> str:
    """The last lines that speak of an error, or else the last one; without a traceback, whose end is told anyway."""
    before = log.partition("Traceback (most recent call last)")[0]
    lines = [
        line for line in map(str.strip, re.split(r"[\r\n]|\x1b\[K", before)) if line
    ]  # bars of progress redraw lines
    telling = [line for line in lines if _TELLING.search(line)]
    return "; ".join(telling[-_COMPLAINTS:] or lines[-1:]) or "it said nothing"


def _problem(reply: httpx.Response) -> str:
    """What our server says in its own words."""
    try:
        return str(reply.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return reply.text[:300]
