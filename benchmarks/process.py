"""Child processes of benchmarks: started, waited for, their memory sampled, their logs kept, and ended for sure."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil

ROOT = Path(__file__).parents[1]  # where `python -m` finds benchmarks and server
_READY = re.compile(r"is ready: open (http://\S+)")
START_SECONDS = 300.0  # seconds for a server to become ready
_STOP = 30.0  # seconds for a process to end after SIGTERM, before it is killed
_POLL = 0.05  # seconds between readiness checks
_SAMPLE = 0.5  # seconds between memory samples: reading PSS walks page tables, which costs milliseconds per GB
_LINES = 4  # of a log, as the reason of a failure: the first of them tends to be the cause
_ERROR_LINE = re.compile(r"error|cannot|failed|wrong", re.IGNORECASE)


class ServerStartError(Exception):
    """A server did not become ready; the message holds its command and what it logged."""


class ChildProcess:
    """A child process in a session of its own. A context manager: on exit, nothing of that session is left running.

    Standard error goes to `log`, and so does standard output unless the process is `interactive`.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        folder: Path = ROOT,
        variables: Mapping[str, str] | None = None,
        interactive: bool = False,
        sample_memory: bool = False,
    ) -> None:
        """`variables` are added to the environment. An interactive process talks through its standard streams.

        Raises OSError where `command` cannot be started.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self.command, self.folder, self.log = tuple(command), folder, log
        self.peak_memory = 0  # bytes, the most of all samples
        self.started = time.perf_counter()
        pipe = subprocess.PIPE if interactive else None
        with log.open("w", encoding="utf-8") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own commands
                self.command,
                cwd=folder,
                env={**os.environ, **(variables or {})},
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or output,
                stderr=output,
                text=True,
                start_new_session=True,  # so that children that outlive it can be found
            )
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True) if sample_memory else None
        if self._sampler:
            self._sampler.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while the process runs."""
        return self._process.poll()

    @property
    def output(self) -> str:
        """What the process has logged so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def cpu_seconds(self) -> float:
        """Processor time of all threads of the process so far. Raises psutil.Error when it has ended."""
        spent = psutil.Process(self.pid).cpu_times()
        return float(spent.user + spent.system)

    def write_line(self, line: str) -> None:
        """Send a line to an interactive process. Raises BrokenPipeError when it has ended."""
        if self._process.stdin:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def read_line(self, *, timeout: float) -> str:
        """The next line of an interactive process; empty when it has ended, or was killed after `timeout` seconds."""
        timer = threading.Timer(timeout, self._process.kill)
        timer.start()
        try:
            return self._process.stdout.readline() if self._process.stdout else ""
        finally:
            timer.cancel()

    def stop(self) -> None:
        """End the process and its children, politely first. Does nothing the second time."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._sampler:
            self._sampler.join()
            self._take_sample()
        self._close(self._process.stdin)  # an interactive process ends with its input
        if not self._process.stdin:
            self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._close(self._process.stdout)

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE):
            self._take_sample()

    def _take_sample(self) -> None:
        self.peak_memory = max(self.peak_memory, memory_of(self.pid))

    @staticmethod
    def _close(stream: object) -> None:
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()  # type: ignore[attr-defined]


class ServerProcess(ChildProcess):
    """A server in a child process: on entry, it is ready at `url`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int | None = None,
        log: Path | None = None,
        folder: Path = ROOT,
        variables: Mapping[str, str] | None = None,
        sample_memory: bool = False,
    ) -> None:
        """`port` is where `command` listens; without one, the URL is read from our server's log (`--port 0`).

        The log is kept only if its path is given.
        """
        self._temporary = tempfile.TemporaryDirectory() if log is None else None
        path = log or Path(self._temporary.name if self._temporary else "") / "server.log"
        super().__init__(command, log=path, folder=folder, variables=variables, sample_memory=sample_memory)
        self.url = f"http://127.0.0.1:{port}" if port else ""
        self.ready_after = 0.0  # seconds from starting the process to being ready

    def __enter__(self) -> Self:
        """Wait until the server is ready. Raises ServerStartError."""
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        self.ready_after = time.perf_counter() - self.started
        return self

    def stop(self) -> None:
        super().stop()
        if self._temporary:
            self._temporary.cleanup()

    def _wait(self) -> None:
        deadline = self.started + START_SECONDS
        with httpx.Client(timeout=_STOP, trust_env=False) as client:
            while time.perf_counter() < deadline:
                if self._is_ready(client):
                    return
                if self.exit_code is not None:
                    raise ServerStartError(f"{self._name()} ended with exit code {self.exit_code}: {self.output}")
                time.sleep(_POLL if self.url else _POLL / 10)
        raise ServerStartError(f"{self._name()} is not ready after {START_SECONDS:g} s: {self.output}")

    def _is_ready(self, client: httpx.Client) -> bool:
        if not self.url and (found := _READY.search(self.output)):
            self.url = found[1]
        if self.url:
            with suppress(httpx.TransportError):
                return client.get(f"{self.url}/v2/health/ready").status_code == 200
        return False

    def _name(self) -> str:
        return f"{shlex.join(self.command)} in {self.folder}"


def server_command(*arguments: str, module: str = "server") -> list[str]:
    """The command of our server at a free port, whose URL it logs."""
    return [sys.executable, "-m", module, "--port", "0", *arguments]


def free_port() -> int:
    """A port of this machine's loopback address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def memory_of(pid: int) -> int:
    """Proportional set size of a process and its descendants, bytes: memory they share counts once. 0 when it ended."""
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        return sum(map(_proportional, [root, *root.children(recursive=True)]))
    return 0


def _proportional(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        bytes_: int = process.memory_full_info().pss
        return bytes_
    return 0


def failure_reason(log: str) -> str:
    """The last lines that speak of an error, or else the last line; a traceback is left out."""
    before = log.partition("Traceback (most recent call last)")[0]
    lines = [line for line in map(str.strip, re.split(r"[\r\n]|\x1b\[K", before)) if line]  # progress bars redraw lines
    errors = [line for line in lines if _ERROR_LINE.search(line)]
    return "; ".join(errors[-_LINES:] or lines[-1:]) or "it logged nothing"
