"""LoRAs over every API, on a real server whose folder changes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from engines.manifest import Manifest
from server.requests.infotext import parse
from tests.support.lora_files import write_lora
from tests.support.serving import Serving, pictures

FAST = {"num_inference_steps": 1, "seed": 1, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def able(lora_bundle: Path) -> Manifest:
    return Manifest.load(lora_bundle)


@pytest.fixture(scope="module")
def folder(able: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("loras")
    write_lora(made / "ink.safetensors", able, metadata={"ss_output_name": "Ink"})
    write_lora(made / "styles/wash.safetensors", able, seed=1)
    (made / "broken.safetensors").write_bytes(b"no LoRA")
    return made


@pytest.fixture(scope="module")
def running(lora_bundle: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    database = tmp_path_factory.mktemp("jobs") / "jobs.sqlite"
    with Serving(lora_bundle, "--loras", str(folder), "--jobs-database", str(database)) as serving:
        yield serving


def test_loras_are_listed_without_paths(running: Serving, folder: Path) -> None:
    answer = running.client.get("/loras")
    listed = {lora["name"]: lora for lora in answer.json()}
    usable = {name: lora["usable"] for name, lora in listed.items()}
    assert usable.items() >= {"broken": False, "ink": True, "styles/wash": True}.items()
    assert listed["broken"]["reason"]
    assert str(folder) not in answer.text
    assert running.client.get("/loras", params={"model": "none"}).status_code == 404
    web_ui = {lora["name"]: lora for lora in running.client.get("/sdapi/v1/loras").json()}
    assert web_ui["ink"] == {
        "name": "ink",
        "alias": "ink",
        "path": "ink.safetensors",
        "metadata": {"ss_output_name": "Ink"},
    }
    assert "broken" not in web_ui


def test_the_list_says_which_the_device_holds(running: Serving) -> None:
    assert running.generate(prompt="a cat<lora:ink:0.8>", **FAST).status_code == 200
    resident = {lora["name"]: lora["resident"] for lora in running.client.get("/loras").json()}
    assert resident.items() >= {"ink": True, "broken": False}.items()


def test_kserve_lists_loras_as_an_input_where_there_are_some(running: Serving, serving: Serving) -> None:
    for server, expected in ((running, [{"name": "loras", "datatype": "BYTES", "shape": [1]}]), (serving, [])):
        (name,) = [model["name"] for model in server.client.get("/models").json()]
        inputs = server.client.get(f"/v2/models/{name}").json()["inputs"]
        assert [one for one in inputs if one["name"] == "loras"] == expected


def test_a_tag_and_the_field_give_the_same_picture(running: Serving) -> None:
    plain = running.generate(prompt="a cat", **FAST)
    tagged = running.generate(prompt="a cat<lora:ink:0.8>", **FAST)
    listed = running.generate(prompt="a cat", loras=[{"name": "ink", "weight": 0.8}], **FAST)
    assert (
        tagged.json()["parameters"]["loras"] == listed.json()["parameters"]["loras"] == [{"name": "ink", "weight": 0.8}]
    )
    assert (pictures(tagged)[0] == pictures(listed)[0]).all()
    assert (pictures(tagged)[0] != pictures(plain)[0]).any()
    again = running.generate(**tagged.json()["parameters"])
    assert (pictures(again)[0] == pictures(tagged)[0]).all()


@pytest.mark.parametrize(
    ("fields", "field", "why"),
    [
        ({"prompt": "<lora:imk:1>"}, "prompt", "There is no LoRA imk: did you mean ink?"),
        ({"prompt": "", "loras": [{"name": "../broken"}]}, "loras", "There is no LoRA ../broken"),
        ({"prompt": "<lora:broken:1>"}, "prompt", "broken.safetensors"),
        ({"prompt": "", "loras": [{"name": "ink", "weight": 11}]}, "loras.0.weight", "less than or equal to 10"),
    ],
)
def test_what_cannot_be_had_is_refused(running: Serving, fields: dict[str, Any], field: str, why: str) -> None:
    answer = running.generate(**fields, **FAST)
    assert answer.status_code == 422
    assert (answer.json()["errors"][0]["field"], why in answer.json()["detail"]) == (field, True)


def test_forms_and_other_apis_choose_loras(running: Serving) -> None:
    client, wanted = running.client, [{"name": "ink", "weight": 0.5}]
    form = {"prompt": (None, "a cat"), "loras": (None, json.dumps(wanted)), "num_inference_steps": (None, "1")}
    assert client.post("/generate", files=form).json()["parameters"]["loras"] == wanted
    hub = {"inputs": "a cat", "parameters": {"loras": wanted, "num_inference_steps": 1}}
    assert infotext(client.post("/generate", json=hub).content)["Prompt"] == "a cat <lora:ink:0.5>"
    openai = {"prompt": "a cat", "loras": [{"name": "no"}], "num_inference_steps": 1}
    refused = client.post("/v1/images/generations", json=openai)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "loras")
    assert client.post("/v1/images/generations", json={**openai, "loras": wanted}).status_code == 200
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a cat <lora:wash:0.5>", "steps": 1})
    (text,) = json.loads(answer.json()["info"])["infotexts"]
    assert 'Lora hashes: "wash: ' in text
    assert client.post("/sdapi/v1/txt2img", json={"prompt": "<lora:no:1>", "steps": 1}).status_code == 422


def test_files_are_noticed_while_the_server_runs(running: Serving, folder: Path, able: Manifest) -> None:
    client = running.client
    assert running.generate(prompt="<lora:new:1>", **FAST).status_code == 422
    write_lora(folder / "new.safetensors", able, seed=2)
    first = running.generate(prompt="a cat <lora:new:1>", **FAST)
    write_lora(folder / "other", able, seed=3).rename(folder / "new.safetensors")
    second = running.generate(prompt="a cat <lora:new:1>", **FAST)
    assert (pictures(first)[0] != pictures(second)[0]).any()
    (folder / "new.safetensors").unlink()
    assert running.generate(prompt="<lora:new:1>", **FAST).status_code == 422
    assert client.post("/sdapi/v1/refresh-loras").status_code == 200


def test_jobs_have_loras(running: Serving) -> None:
    body = {"prompt": "a cat <lora:ink:0.5>", **FAST}
    job = running.client.post("/generate", params={"wait": "false"}, json=body)
    assert job.status_code == 202
    while (state := running.client.get(job.headers["location"]).json())["status"] in ("queued", "running"):
        pass
    assert (state["status"], state["parameters"]["loras"]) == ("completed", [{"name": "ink", "weight": 0.5}])


def test_a_server_without_a_folder_has_none(serving: Serving) -> None:
    assert serving.client.get("/loras").json() == serving.client.get("/sdapi/v1/loras").json() == []
    assert serving.client.post("/sdapi/v1/refresh-loras").status_code == 200
    answer = serving.generate(prompt="a cat <lora:ink:1>", **FAST)
    assert "is treated as text" in answer.json()["warnings"][0]
    assert serving.generate(prompt="", loras=[{"name": "ink"}], **FAST).status_code == 422


def infotext(png: bytes) -> dict[str, str]:
    return parse(PIL.Image.open(io.BytesIO(png)).info["parameters"])
