"""A greedy caller: many connections that ask again at once, from a process of its own.

python -m benchmarks.faults.greedy URL KEY CONNECTIONS FIELDS    until standard input ends; FIELDS is the JSON body
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Self

from benchmarks.faults.callers import Caller, Tally, ask_greedily
from benchmarks.process import ROOT

_PAUSE = 1.0  # seconds between the requests of a connection: two hundred would take the server's CPU without


class GreedyCaller:
    """A context manager: meanwhile the server is asked by `connections` at once, whatever it answers."""

    def __init__(self, url: str, *, key: str, connections: int, fields: Mapping[str, Any]) -> None:
        command = [sys.executable, "-m", "benchmarks.faults.greedy", url, key, str(connections)]
        self._process = subprocess.Popen(  # noqa: S603 - our own command
            [*command, json.dumps(fields)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.endings: Mapping[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.endings = json.loads(self._process.communicate(timeout=120)[0])


async def ask_until_input_ends(url: str, key: str, connections: int, fields: Mapping[str, Any]) -> Tally:
    tally, over = Tally(), asyncio.Event()
    caller = Caller(url, tally, key=key)
    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(ask_greedily(caller, fields, until=over, pause=_PAUSE))
        await asyncio.to_thread(sys.stdin.read)
        over.set()
    return tally


if __name__ == "__main__":
    os.nice(5)  # where cores are few, the server goes first
    seen = asyncio.run(ask_until_input_ends(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])))
    sys.stdout.write(json.dumps(seen.endings))
