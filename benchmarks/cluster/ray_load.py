"""Load on a cluster, of which every request's end is known: for what becomes of requests when replicas come and go."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

import httpx

End = Literal["done", "retried", "refused", "broken off", "lost"]
_BODY = {"prompt": "a red heart on a yellow background", "num_inference_steps": 10}
_PATIENCE = 120.0  # seconds until a request without an end counts as lost
_PAUSE = 0.5  # seconds that a refused client waits: Retry-After says more, and these measure when it works again


@dataclass(frozen=True, slots=True)
class Request:
    """A request that has ended."""

    sent: float  # as of time.monotonic()
    ended: float
    streams: bool
    end: End
    detail: str = ""  # of one that was lost


@dataclass
class Load:
    """Clients of a server, a request each at a time; every third follows events. A context manager."""

    url: str
    clients: int = 6
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number % 3 == 0,)) for number in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _traceback: TracebackType | None) -> None:
        """Let the clients wait for what they have sent."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def counts(self) -> dict[str, int]:
        """How many requests ended how."""
        return dict(Counter(request.end for request in self.requests))

    def _run(self, streams: bool) -> None:
        with httpx.Client(base_url=self.url, timeout=_PATIENCE, trust_env=False) as client:
            while not self._stopped.is_set():
                sent = time.monotonic()
                end, detail = _send(client, streams=streams)
                self.requests.append(Request(sent, time.monotonic(), streams, end, detail))
                if end in ("refused", "lost"):
                    self._stopped.wait(_PAUSE)


def _send(client: httpx.Client, *, streams: bool) -> tuple[End, str]:
    headers = {"Accept": "text/event-stream"} if streams else {}
    try:
        answer = client.post("/generate", json=_BODY, headers=headers)
    except httpx.HTTPError as error:
        return "lost", repr(error)
    if answer.status_code in (429, 503) and "retry-after" in answer.headers:
        return "refused", ""
    if answer.status_code != 200:
        return "lost", f"{answer.status_code} {answer.text[:200]}"
    if streams and "event: completed" not in answer.text:
        broken = "event: error" in answer.text and '"status":503' in answer.text
        return ("broken off", "") if broken else ("lost", answer.text[-200:])
    return ("retried" if "x-retried" in answer.headers else "done"), ""


def recovery(requests: Sequence[Request], at: float, *, clients: int) -> float:
    """Seconds from `at` until as many requests in a row as there are clients were sent after it, and were done."""
    later = sorted((one for one in requests if one.sent >= at), key=lambda one: one.ended)
    for index, _ in enumerate(later):
        row = later[index : index + clients]
        if len(row) == clients and all(one.end == "done" for one in row):
            return row[0].ended - at
    return float("inf")
