"""Health, metrics, and descriptions of the model, the schedulers and the API."""

from __future__ import annotations

import re

from prometheus_client.parser import text_string_to_metric_families

from engines.schedulers import METHODS, NAMES
from server.requests.schemas import GenerateRequest
from tests.support.serving import Serving


def test_a_ready_server_is_live_and_ready(serving: Serving) -> None:
    assert serving.client.get("/v2/health/live").status_code == 200
    assert serving.client.get("/v2/health/ready").status_code == 200


def test_metrics_are_prometheus_text_with_units_and_help(serving: Serving) -> None:
    serving.generate(prompt="a red cat", num_inference_steps=1)
    families = {family.name: family for family in text_string_to_metric_families(serving.client.get("/metrics").text)}
    assert {"latentd_requests", "latentd_step_rows", "latentd_stage_duration_seconds"} <= families.keys()
    stages = {sample.labels["stage"] for sample in families["latentd_stage_duration_seconds"].samples if sample.labels}
    assert stages == {"queue", "encode", "denoise", "decode", "image"}
    assert all(family.documentation for family in families.values())
    assert serving.client.head("/metrics").status_code == 200


def test_the_model_describes_its_capabilities(serving: Serving) -> None:
    (model,) = serving.client.get("/models").json()
    assert model["name"] == "tiny-sd"
    assert model["resolutions"] == ["32x32", "48x32"]
    assert model["schedulers"] == list(NAMES)
    assert (model["scheduler"], model["num_inference_steps"], model["max_rows"]) == ("pndm", 50, 8)


def test_the_api_description_names_every_field(serving: Serving) -> None:
    assert "swagger" in serving.client.get("/docs").text
    operation = serving.client.get("/openapi.json").json()["paths"]["/generate"]["post"]
    described = operation["requestBody"]["content"]["application/json"]["schema"]["anyOf"][0]["properties"]
    assert described.keys() == GenerateRequest.model_fields.keys()
    assert {"image/png", "text/event-stream"} <= operation["responses"]["200"]["content"].keys()
    assert "429" in operation["responses"]


def test_the_page_loads_nothing_external_and_sends_known_fields(serving: Serving) -> None:
    answer = serving.client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    page = answer.text
    assert set(re.findall(r"https?://[^'\" ]+", page)) <= {"http://www.w3.org/2000/svg"}
    fields = set(re.findall(r"name=\"(\w+)\"", page)) - {"size", "viewport", "referrer"}
    assert fields <= GenerateRequest.model_fields.keys()
    assert "prompt" in fields


def test_the_schedulers_are_described(serving: Serving) -> None:
    described = {one["name"]: one for one in serving.client.get("/schedulers").json()}
    assert list(described) == list(METHODS)
    assert {"DPMSolverMultistepScheduler"} <= set(described["dpmpp_2m"]["aliases"])
    assert described["dpmpp_2m"]["sigmas"] == ["default", "karras", "exponential", "beta"]
    assert described["ddim"]["options"] == ["timestep_spacing", "eta"]
    assert (described["heun"]["calls_per_step"], described["euler_ancestral"]["stochastic"]) == (2, True)


def test_every_listed_scheduler_name_is_accepted(serving: Serving) -> None:
    for one in serving.client.get("/schedulers").json():
        for name in (one["name"], one["title"], *one["aliases"], f"{one['name']}_{one['sigmas'][-1]}"):
            answer = serving.generate(prompt="a red cat", scheduler=name, num_inference_steps=2)
            assert answer.status_code == 200, answer.text
            assert answer.json()["parameters"]["scheduler"].startswith(one["name"])
