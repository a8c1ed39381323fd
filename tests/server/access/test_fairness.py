"""The callers that the queue is fair between are keys, wherever they are sent from."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from tests.server.access.conftest import client_of
from tests.support.bare_server import wait_until
from tests.support.meeting import HeldServing
from tests.support.serving import Serving

GREEDY = 8  # connections
WORK = {"prompt": "a red heart", "num_images": 4, "num_inference_steps": 3, "seed": 1}  # two fill the engine's rows
SECONDS = 120  # that a test waits for what must come, on a machine that may be busy
EVENTS = {"Accept": "text/event-stream"}


class Log:
    """What became of the requests, in the order in which it was heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []  # caller, event
        self._lock = threading.Lock()

    def add(self, caller: str, event: str) -> None:
        with self._lock:
            self.heard.append((caller, event))

    def count(self, caller: str, event: str) -> int:
        return self.heard.count((caller, event))


def follow(serving: Serving, caller: str, key: str, address: str, log: Log) -> None:
    """Ask for pictures, and log the events."""
    with (
        client_of(serving, key, address=address) as client,
        client.stream("POST", "/generate", json=WORK, headers=EVENTS) as answer,
    ):
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("event: "):
                log.add(caller, line.removeprefix("event: "))


def test_a_key_with_many_connections_has_one_share(keyed: HeldServing, keyring: Mapping[str, str]) -> None:
    """They come from four addresses, and from that of the other caller too."""
    log = Log()
    with ThreadPoolExecutor(GREEDY + 1) as pool, keyed.held():
        greedy = [
            pool.submit(follow, keyed, "greedy", keyring["alice"], f"127.0.0.{1 + number % 4}", log)
            for number in range(GREEDY)
        ]
        wait_until(lambda: log.count("greedy", "queued") == GREEDY, seconds=SECONDS)
        keyed.let(2)
        wait_until(lambda: log.count("greedy", "started") >= 2, seconds=SECONDS)
        polite = pool.submit(follow, keyed, "polite", keyring["bob"], "127.0.0.1", log)
        wait_until(lambda: log.count("polite", "queued") == 1, seconds=SECONDS)
        keyed.let(10)  # enough where one more is served before it; if each were in its turn, it would take 15
        polite.result(SECONDS)
        assert log.count("greedy", "completed") < GREEDY - 2
    for one in greedy:
        one.result()
    assert log.count("greedy", "completed") == GREEDY
