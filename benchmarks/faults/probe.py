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
_START = 200  # bytes of an answer that are shown
_REQUEST = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Probes:
    """What a prober saw: seconds of each answer 200, in the order of asking, and what became of the other probes."""

    seconds: tuple[float, ...]
    failures: tuple[str, ...]

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
        self.probes = Probes((), ())

    def __enter__(self) -> Self:
        """Wait for the first probe, so that the whole of what follows is probed."""
        if self._process.stdout:
            self._process.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        found = json.loads(self._process.communicate(timeout=2 * _TIMEOUT)[0])
        self.probes = Probes(tuple(found["seconds"]), tuple(found["failures"]))


def probe(host: str, port: int) -> float | str:
    """Ask once, over a new connection; the seconds until the whole answer, or what came in place of a 200."""
    began, answer = time.perf_counter(), b""
    try:
        with socket.create_connection((host, port), timeout=_TIMEOUT) as connection:
            connection.sendall(_REQUEST)
            while received := connection.recv(4096):
                answer += received
    except OSError as error:
        return f"{error!r} after {time.perf_counter() - began:.2f} s, {answer[:_START]!r}"
    return time.perf_counter() - began if answer.startswith(b"HTTP/1.1 200") else repr(answer[:_START])


def main(url: str) -> None:
    parts = urlsplit(url)
    probes: list[float | str] = []
    while not probes or not select.select([sys.stdin], [], [], _PERIOD)[0]:
        probes.append(probe(parts.hostname or "", parts.port or 80))
        if len(probes) == 1:
            _print("probing")
    seconds = [one for one in probes if isinstance(one, float)]
    failures = [one for one in probes if isinstance(one, str)]
    _print(json.dumps({"seconds": seconds, "failures": failures}))


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
