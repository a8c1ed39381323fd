"""`/openapi.json` is what other programs make clients and tests from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate

from server.requests.errors import STATUS
from server.requests.schemas import GenerateRequest, Problem, Readiness
from tests.support.serving import Serving


@pytest.fixture(scope="module")
def document(serving: Serving) -> dict[str, Any]:
    return cast(dict[str, Any], serving.client.get("/openapi.json").json())


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each operation with its method and path."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield f"{method} {path}", operation


def test_it_is_valid_openapi(document: dict[str, Any]) -> None:
    validate(document)


def test_every_operation_is_named_tagged_and_summarised_once(document: dict[str, Any]) -> None:
    found = dict(operations(document))
    assert {name for name in found if "/sdapi/" not in name} == {
        "post /generate",
        "get /jobs",
        "get /jobs/{job_id}",
        "delete /jobs/{job_id}",
        "get /jobs/{job_id}/image",
        "get /jobs/{job_id}/images/{index}",
        "get /jobs/{job_id}/events",
        "get /v2/health/live",
        "get /v2/health/ready",
        "get /v2",
        "get /v2/models/{model}",
        "get /v2/models/{model}/ready",
        "post /v2/repository/index",
        "post /v2/repository/models/{model}/load",
        "post /v2/repository/models/{model}/unload",
        "get /metrics",
        "get /models",
        "get /schedulers",
        "get /loras",
        "post /v1/images/generations",
        "post /v1/images/edits",
        "get /v1/models",
        "get /v1/models/{model}",
    }
    ids = [operation["operationId"] for operation in found.values()]
    assert len(ids) == len(set(ids))
    tags = {tag["name"] for tag in document["tags"]}
    assert all(operation["summary"] and set(operation["tags"]) <= tags for operation in found.values())


def test_errors_are_problem_details(document: dict[str, Any]) -> None:
    responses = document["paths"]["/generate"]["post"]["responses"]
    assert set(responses) == {"200", "202", "431", *(str(status) for status in STATUS.values() if status != 499)}
    for status in set(responses) - {"200", "202"}:
        content = responses[status]["content"]["application/problem+json"]
        others = set() if status == "431" else {"application/json"}  # Hugging Face's form
        assert responses[status]["content"].keys() == {"application/problem+json", *others}
        assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
        assert Problem.model_validate(content["example"]).status == int(status)
        assert ("Retry-After" in responses[status].get("headers", {})) == (status in {"429", "503"})


def test_readiness_has_a_body_when_it_is_503(document: dict[str, Any]) -> None:
    content = document["paths"]["/v2/health/ready"]["get"]["responses"]["503"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/Readiness"}
    assert not Readiness.model_validate(content["example"]).ready


def test_examples_of_requests_fit_their_schema(document: dict[str, Any]) -> None:
    content = document["paths"]["/generate"]["post"]["requestBody"]["content"]
    assert content.keys() == {"application/json", "multipart/form-data"}
    validator = OAS31Validator(content["application/json"]["schema"])
    for example in content["application/json"]["examples"].values():
        validator.validate(example["value"])
        if "inputs" not in example["value"]:
            GenerateRequest.model_validate(example["value"])


def test_a_form_has_no_null(document: dict[str, Any]) -> None:
    content = document["paths"]["/generate"]["post"]["requestBody"]["content"]
    fields = content["multipart/form-data"]["schema"]["properties"]
    assert fields.keys() == content["application/json"]["schema"]["anyOf"][0]["properties"].keys()
    assert "null" not in str(fields)
    assert (fields["eta"]["type"], fields["image"]["format"]) == ("number", "binary")


def test_answers_fit_what_is_described(serving: Serving, document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    answer = serving.generate(prompt="a red cat", num_inference_steps=1)
    refused = serving.generate(prompt="a red cat", num_inference_steps=0)
    for name, body in (("GenerateResponse", answer.json()), ("Problem", refused.json())):
        OAS31Validator({"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}).validate(body)
