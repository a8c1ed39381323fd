"""Two servers behind each proxy are restarted one after the other under load, and no request is lost."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from engines.demo import BUNDLE
from tests.deploy.conftest import BEHIND
from tests.support.bare_server import wait_until
from tests.support.ports import free_ports
from tests.support.proxies import PROXIES, proxied
from tests.support.serving import Serving

pytestmark = pytest.mark.faults  # six starts of a server for each proxy

CLIENTS = 6
WORK = {"prompt": "a red heart", "num_inference_steps": 4, "seed": 1}


class Load:
    """Clients that ask one after the other, each on a connection of its own, until `stop` is set."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.stop = threading.Event()
        self.endings: Counter[str] = Counter()

    def ask(self, accept: str) -> None:
        with httpx.Client(base_url=self._url, timeout=300) as client:
            while not self.stop.is_set():
                self.endings[_ending(client, accept)] += 1


def _ending(client: httpx.Client, accept: str) -> str:
    """`200`, or what else became of a request."""
    try:
        answer = client.post("/generate", json=WORK, headers={"Accept": accept})
    except httpx.TransportError as error:
        return repr(error)
    if answer.status_code == 200 and (accept != "text/event-stream" or "event: completed" in answer.text):
        return "200"
    return f"{answer.status_code} {answer.text[:200]}"


@contextmanager
def loaded(url: str) -> Iterator[Load]:
    load = Load(url)
    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(load.ask, ("image/png", "text/event-stream")[number % 2]) for number in range(CLIENTS)]
        try:
            yield load
        finally:
            load.stop.set()
    for one in asking:
        one.result()


@pytest.mark.parametrize("name", PROXIES)
def test_no_request_is_lost(name: str, tmp_path: Path) -> None:
    ports = free_ports(2)
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(port)) for port in ports]
        url = stack.enter_context(proxied(name, tmp_path, *(server.url for server in servers)))
        load = stack.enter_context(loaded(url))
        for server, port in zip(servers, ports, strict=True):
            served = load.endings.total()
            assert server.stop(how=signal.SIGTERM) == 0
            wait_for_more(load, served)
            restarted = stack.enter_context(serving(port))
            wait_until(partial(has_served, restarted), seconds=120)
        load.stop.set()
    assert set(load.endings) == {"200"}, f"{load.endings}\n{(tmp_path / 'log').read_text()}"
    assert load.endings.total() > 2 * CLIENTS


def serving(port: int) -> Serving:
    return Serving(BUNDLE, *BEHIND, "--port", str(port))


def has_served(server: Serving) -> bool:
    return server.metrics()["latentd_requests_total"] > 0


def wait_for_more(load: Load, served: int) -> None:
    """Until clients have had answers since, of the server that is left."""
    while load.endings.total() < served + 3 * CLIENTS:
        assert not load.stop.wait(0.05)
