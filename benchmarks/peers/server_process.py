"""A server in a process of its own, from its start to its end, and the memory it takes."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil

from loadtest.client import LoadTestError

ROOT = Path(__file__).parents[2]  # where `-m` finds the servers
_PATIENCE = 300.0  # seconds for a start,
_END = 30.0  # and for an end
_LOOK = 0.05  # seconds between questions whether it is ready
_WEIGH = 1.0  # seconds between looks at its memory


class Running:
    """The server that `command` starts at `port`, ready; a context manager.

    Raises LoadTestError where it does not start.
    """

    def __init__(self, command: Sequence[str], *, port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.memory = 0  # bytes at most so far, of all its processes
        self.ready_after = 0.0  # seconds
        self._command = command
        self._log = log
        self._ended = threading.Event()
        self._scales = threading.Thread(target=self._weigh, daemon=True)

    def __enter__(self) -> Self:
        began = time.perf_counter()
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own commands
                self._command,
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,  # LitServe's processes do not all end with their first
            )
        self._scales.start()
        try:
            self._wait(began + _PATIENCE)
        except BaseException:
            self._stop()
            raise
        self.ready_after = time.perf_counter() - began
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _wait(self, until: float) -> None:
        with httpx.Client(base_url=self.url, timeout=_END, trust_env=False) as client:
            while time.perf_counter() < until:
                if self._process.poll() is not None:
                    raise LoadTestError(
                        f"{shlex.join(self._command)} ended with {self._process.returncode}: see {self._log}"
                    )
                with suppress(httpx.TransportError):
                    if client.get("/v2/health/ready").status_code == 200:
                        return
                time.sleep(_LOOK)
        raise LoadTestError(f"{shlex.join(self._command)} is not ready after {_PATIENCE:g} s: see {self._log}")

    def _weigh(self) -> None:
        """Proportional set size, so that a library that several of its processes share counts once."""
        while not self._ended.wait(_WEIGH):
            with suppress(psutil.Error):
                root = psutil.Process(self._process.pid)
                self.memory = max(self.memory, sum(map(_memory, [root, *root.children(recursive=True)])))

    def _stop(self) -> None:
        """As a supervisor does; what is left of its session after that is killed."""
        self._ended.set()
        self._scales.join()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_END)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _memory(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        bytes_: int = process.memory_full_info().pss
        return bytes_
    return 0
