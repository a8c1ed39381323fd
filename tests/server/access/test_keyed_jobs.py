"""Jobs of a server that asks for keys: each is for the key that sent it, and for administrators."""

from __future__ import annotations

from collections.abc import Mapping

from tests.server.access.conftest import client_of
from tests.support.jobs import wait_for_job
from tests.support.meeting import HeldServing
from tests.support.serving import Serving

QUICK = {"prompt": "a red heart", "num_inference_steps": 1, "seed": 1}


def test_a_job_is_for_its_key_and_administrators(keyed: Serving, keyring: Mapping[str, str]) -> None:
    with client_of(keyed, keyring["alice"]) as alice, client_of(keyed, keyring["bob"]) as bob:
        path = alice.post("/generate?wait=false", json=QUICK).headers["Location"]
        done = wait_for_job(keyed, path)  # as the administrator
        for part in ("", "/image", "/images/0", "/events"):
            assert bob.get(path + part).status_code == 404
            assert alice.get(path + part).status_code == 200
        assert bob.delete(path).status_code == 404
        assert bob.get("/jobs").json() == {"jobs": []}
        assert alice.get("/jobs").json() == keyed.client.get("/jobs").json() == {"jobs": [done]}
        assert alice.delete(path).status_code == 204
    with client_of(keyed, "") as nobody:
        assert nobody.get(path).status_code == 401


def test_the_same_idempotency_key_of_two_callers_is_two_jobs(keyed: Serving, keyring: Mapping[str, str]) -> None:
    with client_of(keyed, keyring["alice"]) as alice, client_of(keyed, keyring["bob"]) as bob:
        jobs = [
            one.post("/generate", json=QUICK, headers={"Idempotency-Key": "1"}).json()["id"] for one in (alice, bob)
        ]
        assert jobs[0] != jobs[1]


def test_a_job_takes_the_place_of_its_key_until_it_ends(keyed: HeldServing, keyring: Mapping[str, str]) -> None:
    """`narrow` may have one request at a time."""
    long = {**QUICK, "num_inference_steps": 200}
    with client_of(keyed, keyring["narrow"]) as narrow:
        with keyed.held():
            path = narrow.post("/generate?wait=false", json=long).headers["Location"]
            assert narrow.post("/generate", json=QUICK).status_code == 429
            narrow.delete(path)
        assert wait_for_job(keyed, path)["status"] == "cancelled"
        assert narrow.post("/generate", json=QUICK).status_code == 200
