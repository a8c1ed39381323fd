"""A server that asks for keys."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import MagicMock

import httpx
import pytest
from openapi_spec_validator import validate

from server.access import keys
from server.app import routes
from tests.server.access.conftest import client_of
from tests.support.bare_server import wait_until
from tests.support.meeting import HeldServing
from tests.support.serving import Serving

QUICK = {"prompt": "a red heart", "num_inference_steps": 1, "seed": 1}
LONG = {"prompt": "a red heart", "num_inference_steps": 200, "seed": 1}
EVENTS = {"Accept": "text/event-stream"}


def ask(serving: Serving, key: str, **fields: object) -> httpx.Response:
    with client_of(serving, key) as client:
        return client.post("/generate", json={**QUICK, **fields})


def rejected(serving: Serving, reason: str) -> float:
    return serving.metrics()[f'latentd_requests_rejected_total{{reason="{reason}"}}']


def test_a_key_gets_a_picture_and_others_get_none(keyed: Serving, keyring: Mapping[str, str]) -> None:
    before = rejected(keyed, "Unauthenticated")
    assert ask(keyed, keyring["alice"]).status_code == 200
    for key in ("", keyring["alice"][:-1], keys.digest(keyring["alice"])):
        assert ask(keyed, key).status_code == 401
    assert rejected(keyed, "Unauthenticated") == before + 3


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/v2/health/live", "/v2/health/ready"])
def test_the_page_and_probes_need_no_key(keyed: Serving, path: str) -> None:
    assert httpx.get(keyed.url + path).status_code == 200
    assert httpx.head(keyed.url + path).status_code == 200


def test_the_files_of_the_page_need_no_key(keyed: Serving) -> None:
    with client_of(keyed, "") as client:
        assert client.get("/playground/main.js").status_code == 200
        assert client.get("/models").status_code == 401


def test_metrics_are_for_administrators(keyed: Serving, keyring: Mapping[str, str]) -> None:
    with client_of(keyed, keyring["alice"]) as client:
        assert client.get("/metrics").status_code == 403
    assert keyed.client.get("/metrics").status_code == 200


@pytest.mark.parametrize("path", ["index", "models/latentd-demo/load", "models/latentd-demo/unload"])
def test_models_are_loaded_and_unloaded_by_administrators(
    keyed: Serving, keyring: Mapping[str, str], path: str
) -> None:
    with client_of(keyed, keyring["alice"]) as client:
        answer = client.post(f"/v2/repository/{path}")
    assert (answer.status_code, answer.json()) == (403, {"error": "This needs the API key of an administrator."})
    with client_of(keyed, "") as client:
        assert client.post(f"/v2/repository/{path}").status_code == 401
    assert keyed.client.post("/v2/repository/index").json()[0]["state"] == "READY"


def test_a_refused_body_is_not_read(keyed: Serving) -> None:
    """The body is larger than any that is accepted, and the answer is about the key."""
    refused = httpx.post(f"{keyed.url}/generate", content=bytes(1_000_000), headers={"Content-Type": "image/png"})
    assert refused.status_code == 401
    assert refused.headers["Cache-Control"] == "no-store"


def test_the_description_says_how_to_send_a_key(keyed: Serving) -> None:
    document = keyed.client.get("/openapi.json").json()
    validate(document)
    assert document["components"]["securitySchemes"].keys() == {"bearer", "header", "basic"}
    assert document["security"] == [{"bearer": []}, {"header": []}, {"basic": []}]
    assert "security" not in document["paths"]["/generate"]["post"]
    assert document["paths"]["/v2/health/live"]["get"]["security"] == []
    open_document = routes(MagicMock()).openapi()
    assert open_document["security"] == []
    assert "--api-keys" in open_document["info"]["description"]


def test_a_running_server_learns_of_new_and_revoked_keys(keyed: Serving, key_file: Path) -> None:
    before, late = key_file.read_text(), keys.new_key()
    key_file.write_text(before + "\n" + keys.entry("late", late, admin=False))
    try:
        wait_until(lambda: ask(keyed, late).status_code == 200)
        key_file.write_text("[[keys]")
        wait_until(lambda: any("stay valid" in line for line in keyed.stderr))
        assert ask(keyed, late).status_code == 200, "a broken file revokes nothing"
    finally:
        key_file.write_text(before)
    wait_until(lambda: ask(keyed, late).status_code in (401, 429))


def test_a_rate_of_a_key_is_kept(keyed: Serving, keyring: Mapping[str, str]) -> None:
    key = keyring["hasty"]
    assert [ask(keyed, key).status_code for _ in range(3)] == [200, 200, 429]
    refused = ask(keyed, key)
    assert refused.json()["title"] == "Rate limited"
    assert 3000 < int(refused.headers["Retry-After"]) <= 3600
    assert ask(keyed, keyring["alice"]).status_code == 200, "the others have their own"


def test_a_place_is_free_again_after_every_kind_of_outcome(keyed: HeldServing, keyring: Mapping[str, str]) -> None:
    key = keyring["narrow"]
    for ending in ("disconnect", "picture", "invalid"):
        if ending == "invalid":
            assert ask(keyed, key, width=63).status_code == 422
            assert ask(keyed, key, prompt=1).status_code == 422
            assert ask(keyed, key, image="AAAA").status_code == 422
        else:
            check_one_at_a_time(keyed, key, leaves=ending == "disconnect")
        wait_until(lambda: ask(keyed, key).status_code == 200)


def check_one_at_a_time(keyed: HeldServing, key: str, *, leaves: bool) -> None:
    with client_of(keyed, key) as client, ExitStack() as hold:
        hold.enter_context(keyed.held())
        with client.stream("POST", "/generate", json=LONG, headers=EVENTS) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: queued"
            refused = ask(keyed, key)
            assert (refused.status_code, refused.json()["title"]) == (429, "Rate limited")
            assert "wait for one of them" in refused.json()["detail"]
            hold.close()
            if not leaves:
                assert "event: completed" in list(lines)
