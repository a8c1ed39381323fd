"""Asks /v2/health/live again and again, from a process of its own: the time of each answer, whatever others do.

python -m benchmarks.faults.probe URL    until standard input ends; then prints the probes as JSON
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from benchmarks.process import ROOT

_PERIOD = 0.05  # seconds between probes: 20 a second cost the server next to nothing
_TIMEOUT = 30.0  # seconds
_REQUEST = b"GET /v2/health/live HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Probes:
    """What a prober saw: seconds of each answer 200, in the order of asking, and how many probes got none."""

    seconds: tuple[float, ...]
    failures: int

    @property
    def slowest(self) -> float:
        return max(self.seconds, default=0.0)


class Prober:
    """A context manager that probes the server meanwhile; `probes` has what was seen, once it has ended."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-m", "benchmarks.faults.probe", url]
        self._process = subprocess.Popen(  # noqa: S603 - our own command
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.probes = Probes((), 0)

    def __enter__(self) -> Self:
        """Wait for the first probe, so that the whole of what follows is probed."""
        if self._process.stdout:
            self._process.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        found = json.loads(self._process.communicate(timeout=2 * _TIMEOUT)[0])
        self.probes = Probes(tuple(found["seconds"]), found["failures"])


def probe(host: str, port: int) -> float | None:
    """Ask once, over a new connection; the seconds until the whole answer, or None unless it is 200."""
    began, answer = time.perf_counter(), b""
    try:
        with socket.create_connection((host, port), timeout=_TIMEOUT) as connection:
            connection.sendall(_REQUEST)
            while received := connection.recv(4096):
                answer += received
    except OSError:
        return None
    return time.perf_counter() - began if answer.startswith(b"HTTP/1.1 200") else None


def main(url: str) -> None:
    parts = urlsplit(url)
    probes: list[float | None] = []
    while not probes or not select.select([sys.stdin], [], [], _PERIOD)[0]:
        probes.append(probe(parts.hostname or "", parts.port or 80))
        if len(probes) == 1:
            _print("probing")
    seconds = [one for one in probes if one is not None]
    _print(json.dumps({"seconds": seconds, "failures": len(probes) - len(seconds)}))


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
