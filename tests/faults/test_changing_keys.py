"""A file of keys that is written again and again, in every way, while its keys are in use."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx

from engines.demo import BUNDLE as DEMO
from server.access import keys
from tests.support.bare_server import wait_until
from tests.support.serving import Serving

_ROUNDS = 8
STAYS, COMES = keys.new_key(), keys.new_key()
FEW = keys.entry("stays", STAYS, admin=True)
MANY = FEW + "\n" + keys.entry("comes", COMES, admin=False)


def write(path: Path, text: str) -> None:
    path.write_text(text)


def replace(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def write_slowly(path: Path, text: str) -> None:
    """As an editor on a slow disk: the file is empty, then half of it is there."""
    with path.open("w") as out:
        for piece in (text[: len(text) // 2], text[len(text) // 2 :]):
            out.flush()
            threading.Event().wait(0.3)
            out.write(piece)


def remove_first(path: Path, text: str) -> None:
    path.unlink()
    threading.Event().wait(0.3)
    path.write_text(text)


def ask_until(over: threading.Event, url: str, key: str, statuses: Counter[int]) -> None:
    with httpx.Client(base_url=url, headers={"X-API-Key": key}, timeout=60) as client:
        while not over.is_set():
            statuses[client.get("/models").status_code] += 1


def test_a_key_that_stays_is_never_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(FEW)
    ways: list[Callable[[Path, str], None]] = [replace, write_slowly, remove_first, write]
    over, statuses = threading.Event(), Counter[int]()
    with Serving(DEMO, "--api-keys", str(path)) as serving, ThreadPoolExecutor(4) as pool:
        try:
            asking = [pool.submit(ask_until, over, serving.url, STAYS, statuses) for _ in range(4)]
            for number in range(_ROUNDS):
                known = number % 2 == 0
                ways[number % len(ways)](path, MANY if known else FEW)
                wait_until(partial(knows, serving, COMES, wanted=known))
        finally:
            over.set()
        for one in asking:
            one.result()
        assert not [line for line in serving.stderr if "Traceback" in line]
    assert set(statuses) == {200}
    assert statuses[200] > 100


def knows(serving: Serving, key: str, *, wanted: bool) -> bool:
    """Whether the server knows the key, or does not, as `wanted`."""
    return (serving.client.get("/models", headers={"X-API-Key": key}).status_code == 200) == wanted
