"""A real server in a process of its own, as people start it."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import PIL.Image
from numpy.typing import NDArray

_PATIENCE = 300  # seconds for what takes three on a machine that does nothing else
_READY = re.compile(r"is ready: open (http://[^\s\\]+)")


def run_server(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m server` with `variables` in its environment, for a server that ends by itself."""
    command = [sys.executable, "-m", "server", *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_PATIENCE, check=False)  # noqa: S603 - our own command


def pictures(answer: httpx.Response) -> list[NDArray[np.float64]]:
    """The pictures [H, W, 3] in 0..255 of a JSON answer."""
    assert answer.status_code == 200, answer.text
    files = (base64.b64decode(image["image"]) for image in answer.json()["images"])
    return [np.asarray(PIL.Image.open(io.BytesIO(file)), np.float64) for file in files]


class Serving:
    """`python -m server` on a free port. A context manager; `client` speaks to it."""

    def __init__(
        self,
        bundle: Path,
        *arguments: str,
        start_seconds: float = _PATIENCE,
        module: str = "server",
        within: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`within` is a command that runs the server, and `environment` replaces this process's."""
        options = ["--bundle", str(bundle), "--port", "0", "--threads", "1", *arguments]
        command = [*within, sys.executable, "-m", module, *options]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)  # noqa: S603 - our own command
        self.stderr: list[str] = []
        self._url = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(start_seconds) or not self._url:
            self.stop(how=signal.SIGKILL)
            raise RuntimeError(f"the server did not start: {''.join(self.stderr)}")
        self.client = httpx.Client(base_url=self._url, timeout=_PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.stop()

    @property
    def url(self) -> str:
        return self._url

    def generate(self, **fields: Any) -> httpx.Response:
        """`POST /generate` with `fields` as JSON."""
        return self.client.post("/generate", json=fields)

    def metrics(self) -> dict[str, float]:
        """`GET /metrics`: each value by its name and labels, and by its name alone the sum over all labels."""
        lines = self.client.get("/metrics").text.splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        values = {name: float(value) for name, _, value in pairs}
        sums: defaultdict[str, float] = defaultdict(float)
        for name, value in values.items():
            sums[name.partition("{")[0]] += value
        return {**sums, **values}

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric over its labels, of those that have the values `labels`."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            value
            for key, value in self.metrics().items()
            if key.startswith(f"{name}{{") and all(label in key for label in wanted)
        )

    def logged(self, text: str, seconds: float = _PATIENCE) -> bool:
        """Whether `text` is on standard error. Answers come sooner than lines, which are waited for."""
        until = time.monotonic() + seconds
        while text not in "".join(self.stderr):
            if time.monotonic() > until or not self._reader.is_alive():
                return text in "".join(self.stderr)
            time.sleep(0.02)
        return True

    def stop(self, *, how: signal.Signals = signal.SIGTERM, seconds: float = _PATIENCE) -> int:
        """Send a signal and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(seconds)
        self._reader.join(seconds)
        if self.process.stderr:
            self.process.stderr.close()
        return code

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr.append(line)
            if found := _READY.search(line):
                self._url = found[1]
                self._ready.set()
        self._ready.set()  # the process ended; without a URL that is a failed start
