"""webuiapi with an API key, which it sends as the password of HTTP Basic authentication."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import webuiapi

from engines.demo import BUNDLE as DEMO
from server.access import keys
from tests.support.bare_server import wait_until
from tests.support.meeting import HeldServing
from tests.support.serving import Serving

KEYS = {name: keys.new_key() for name in ("alice", "bob", "root")}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeldServing]:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text("\n".join(keys.entry(name, key, admin=name == "root") for name, key in KEYS.items()))
    with HeldServing(DEMO, "--api-keys", str(file)) as running:
        yield running


def connect(serving: Serving, name: str) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{serving.url}/sdapi/v1", username=name, password=KEYS[name])


def generate(api: webuiapi.WebUIApi, *, steps: int) -> webuiapi.WebUIApiResult:
    return api.txt2img(prompt="a red heart", width=64, height=64, steps=steps, batch_size=8)


def test_a_key_is_the_password(keyed: Serving) -> None:
    assert generate(connect(keyed, "alice"), steps=2).images
    api = webuiapi.WebUIApi(baseurl=f"{keyed.url}/sdapi/v1")
    with pytest.raises(RuntimeError) as refused:
        generate(api, steps=2)
    assert refused.value.args[0] == 401
    assert "detail" in refused.value.args[1]
    api.set_auth("alice", KEYS["alice"])
    assert generate(api, steps=2).images


def test_callers_see_and_interrupt_their_own_calls_and_an_administrator_all(keyed: HeldServing) -> None:
    alice, bob, root = (connect(keyed, name) for name in ("alice", "bob", "root"))
    with ThreadPoolExecutor(1) as threads:
        with keyed.held():
            keyed.let(9)
            call = threads.submit(lambda: generate(connect(keyed, "alice"), steps=200))
            wait_until(lambda: alice.get_progress()["state"]["sampling_step"] > 0)
            assert bob.get_progress()["state"]["job_count"] == 0
            assert bob.interrupt() == {}
            assert not alice.get_progress()["state"]["interrupted"]
            assert root.get_progress()["state"]["job"] == alice.get_progress()["state"]["job"]
            assert root.interrupt() == {}
        with pytest.raises(RuntimeError) as ended:
            call.result()
    assert ended.value.args[0] == 499
