"""Systems at work in child processes: a pipeline over its standard streams, and our server over HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from benchmarks.process import ChildProcess, ServerProcess, ServerStartError, failure_reason, server_command
from engines.errors import EngineError

_TIMEOUT = 1800.0  # seconds an image or a start may take
_WORKER = "benchmarks.peers.pipelines.worker"


@dataclass(frozen=True, slots=True)
class ImageTask:
    """One image to generate."""

    prompt: str
    seed: int
    steps: int
    size: tuple[int, int]  # width, height
    guidance: float
    out: Path  # the PNG file to write


class SystemRunner(Protocol):
    """A system that is ready."""

    startup: float  # seconds from starting the process to being ready

    def generate(self, task: ImageTask) -> float:
        """Write the image; returns the seconds from the request to the image. Raises EngineError."""

    def close(self) -> int:
        """End the process; returns the peak memory of it and its children in bytes."""


class PipelineRunner:
    """A pipeline in a worker process under an interpreter of its own."""

    def __init__(self, python: str, spec: Mapping[str, Any], log: Path, *, variables: Mapping[str, str]) -> None:
        """Load the pipeline that `spec` describes. Raises EngineError if it cannot be loaded."""
        command = [python, "-m", _WORKER, json.dumps(spec)]
        self._process = ChildProcess(command, log=log, variables=variables, interactive=True, sample_memory=True)
        try:
            self._read_answer()
        except BaseException:
            self._process.stop()
            raise
        self.startup = time.perf_counter() - self._process.started

    def generate(self, task: ImageTask) -> float:
        fields = {"prompt": task.prompt, "seed": task.seed, "steps": task.steps, "out": str(task.out)}
        with suppress(BrokenPipeError):  # it has ended: reading its answer says why
            self._process.write_line(json.dumps(fields))
        return float(self._read_answer()["seconds"])

    def close(self) -> int:
        self._process.stop()
        return self._process.peak_memory

    def _read_answer(self) -> dict[str, Any]:
        line = self._process.read_line(timeout=_TIMEOUT)
        if not line:
            raise EngineError(f"it ended without an answer: {failure_reason(self._process.output)}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise EngineError(f"{answer['failed']} (its log: {failure_reason(self._process.output)})")
        return answer


class ServerRunner:
    """`python -m server`, which is sent one request at a time."""

    def __init__(self, bundle: Path, backend: str, log: Path, *, threads: int, fields: Mapping[str, Any]) -> None:
        """Start the server; `fields` are added to each request. Raises EngineError if it does not start."""
        command = server_command("--bundle", str(bundle), "--backend", backend, "--threads", str(threads))
        try:
            self._server = ServerProcess(command, log=log, sample_memory=True).__enter__()
        except ServerStartError:
            reason = failure_reason(log.read_text(encoding="utf-8", errors="replace"))
            raise EngineError(f"the server did not start: {reason}") from None
        self._fields = fields
        self.startup = self._server.ready_after
        self._http = httpx.Client(base_url=self._server.url, timeout=_TIMEOUT, trust_env=False)

    def generate(self, task: ImageTask) -> float:
        width, height = task.size
        body = {
            "prompt": task.prompt,
            "prompt_syntax": "plain",  # as diffusers reads it
            "seed": task.seed,
            "num_inference_steps": task.steps,
            "width": width,
            "height": height,
            "guidance_scale": task.guidance,
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
            raise EngineError(f"the server answered {reply.status_code}: {_detail(reply)}")
        task.out.write_bytes(reply.content)
        return seconds

    def close(self) -> int:
        self._http.close()
        self._server.stop()
        return self._server.peak_memory


def _detail(reply: httpx.Response) -> str:
    """The detail of a problem+json response, or else its beginning."""
    try:
        return str(reply.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return reply.text[:300]
