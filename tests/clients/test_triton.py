"""Triton's Python client, which speaks the Open Inference Protocol (KServe v2)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from tests.support.serving import Serving


@pytest.fixture
def client(serving: Serving) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(serving.url.removeprefix("http://")) as client:
        yield client


def test_health(client: InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("latentd-demo")
    assert client.is_model_ready("latentd-demo", "1")


def test_unknown_models_and_versions_are_not_ready(client: InferenceServerClient) -> None:
    assert not client.is_model_ready("other")
    assert not client.is_model_ready("acme/other")
    assert not client.is_model_ready("latentd-demo", "2")


def test_metadata(client: InferenceServerClient) -> None:
    assert client.get_server_metadata() == {
        "name": "latentd",
        "version": version("latentd"),
        "extensions": ["model_repository"],
    }
    metadata = client.get_model_metadata("latentd-demo", "1")
    assert metadata == client.get_model_metadata("latentd-demo")
    assert (metadata["versions"], metadata["platform"]) == (["1"], "latentd_onnxruntime")
    assert {"name": "prompt", "datatype": "BYTES", "shape": [1]} in metadata["inputs"]
    assert metadata["outputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]


def test_inputs_are_fields_of_generate(client: InferenceServerClient, serving: Serving) -> None:
    values = {"BYTES": "a cat", "INT32": 1, "UINT32": 7, "FP32": 2.5}
    inputs = {one["name"]: values[one["datatype"]] for one in client.get_model_metadata("latentd-demo")["inputs"]}
    answer = serving.generate(**{**inputs, "width": 64, "height": 64, "num_inference_steps": 2})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("model", "number", "message"),
    [("other", "", "this server has latentd-demo"), ("latentd-demo", "2", "version 1 of each model only")],
)
def test_unknown_models_are_refused(client: InferenceServerClient, model: str, number: str, message: str) -> None:
    with pytest.raises(InferenceServerException, match=message) as refused:
        client.get_model_metadata(model, number)
    assert refused.value.status() == "404"


def test_inference_is_refused(client: InferenceServerClient) -> None:
    prompt = InferInput("prompt", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([b"a cat"], dtype=np.object_))
    with pytest.raises(InferenceServerException, match="POST /generate"):
        client.infer("latentd-demo", [prompt])
