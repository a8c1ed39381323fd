"""The configuration files, by Serve's own schema, and the application that they build."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import yaml
from latentd_serve import app
from latentd_serve.settings import Arguments
from ray.serve.schema import ServeDeploySchema

from server.startup.settings import ServerSettings
from tests import ROOT

_FOLDER = ROOT / "deploy/ray"


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((_FOLDER / name).read_text())
    return found if name != "rayservice.yaml" else yaml.safe_load(found["spec"]["serveConfigV2"])


@pytest.mark.parametrize("name", ["serve.yaml", "trial.yaml", "rayservice.yaml"])
def test_a_file_is_valid_and_names_the_deployments(name: str) -> None:
    schema = ServeDeploySchema.model_validate(_read(name))
    (application,) = schema.applications
    assert application.import_path == "latentd_serve:app"
    assert {deployment.name for deployment in application.deployments} == {"Ingress", "Images"}
    Arguments.model_validate(application.args).settings()


def test_serve_reads_the_type_of_the_arguments() -> None:
    (argument,) = inspect.signature(app).parameters.values()
    assert argument.annotation is Arguments


@pytest.mark.parametrize(
    ("server", "text"),
    [({"bundles": ["/x"]}, "args.server.bundles is no setting"), ({"port": 1}, "args.server.port has no effect")],
)
def test_a_wrong_setting_is_refused_by_its_name(server: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Arguments(server=server).settings()


def test_settings_come_from_the_arguments_and_else_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTD_MAX_WAITING", "7")
    monkeypatch.setenv("LATENTD_THREADS", "3")
    found = Arguments(server={"bundle": ["/a", "b=/c"], "threads": 2}).settings()
    assert isinstance(found, ServerSettings)
    assert (found.bundle, found.threads, found.max_waiting) == (("/a", "b=/c"), 2, 7)


def test_kuberays_pods_may_take_as_long_as_a_replica_to_drain() -> None:
    service = yaml.safe_load((_FOLDER / "rayservice.yaml").read_text())
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > 600
