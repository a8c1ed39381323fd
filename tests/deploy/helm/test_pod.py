"""What the schemas cannot see of the pod: times that must add up, names that must match, and what it may do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from server.startup.settings import ServerSettings
from server.startup.stopping import GRACE_SECONDS
from tests.deploy.helm.cases import CASES, CLAIM, COMPILE_INIT, EXISTING_KEYS, LORAS, MODELS, POD, SETTINGS
from tests.deploy.helm.chart import Manifest, container, environment, of_kind, pod, render
from tests.support.serving import Serving

LOG_SECONDS = 2.0  # in which the last lines of the log are written, at most

each_case = pytest.mark.parametrize("values", CASES.values(), ids=CASES)


def containers(values: Mapping[str, Any]) -> Iterator[Manifest]:
    """Those of all pods, `helm test`'s too."""
    for spec in (pod(values), of_kind("Pod", values)["spec"]):
        yield from spec.get("initContainers", [])
        yield from spec["containers"]


@pytest.mark.parametrize("stopping", [{}, {"endpointSeconds": 15, "drainSeconds": 600}, {"drainSeconds": 0}])
def test_the_grace_period_is_longer_than_stopping_takes(stopping: dict[str, int]) -> None:
    values = {"stopping": stopping}
    before = container(values)["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = int(environment(values)["LATENTD_DRAIN_SECONDS"])
    assert before > 0  # endpoints are removed before SIGTERM is sent
    assert drain == stopping.get("drainSeconds", 60)
    assert pod(values)["terminationGracePeriodSeconds"] > before + drain + GRACE_SECONDS + LOG_SECONDS


def test_probes_ask_what_the_server_answers(pod_server: Serving) -> None:
    asked = {kind: container()[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {kind: probe["path"] for kind, probe in asked.items()} == {
        "startup": "/v2/health/live",
        "liveness": "/v2/health/live",
        "readiness": "/v2/health/ready",
    }
    assert {pod_server.client.get(probe["path"]).status_code for probe in asked.values()} == {200}


def test_compiling_takes_as_long_as_it_takes() -> None:
    """No probe ends a server that compiles, since it is alive; only the rollout counts as failed after a while."""
    startup = container({"startup": {"listenSeconds": 900, "readySeconds": 7200}})["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] >= 900
    assert of_kind("Deployment", {"startup": {"readySeconds": 7200}})["spec"]["progressDeadlineSeconds"] == 7200


@each_case
def test_selectors_match_the_pods_that_serve_alone(values: Mapping[str, Any]) -> None:
    deployment = of_kind("Deployment", values)["spec"]
    serving, testing = deployment["template"]["metadata"]["labels"], of_kind("Pod", values)["metadata"]["labels"]
    selectors = [
        deployment["selector"]["matchLabels"],
        of_kind("Service", values)["spec"]["selector"],
        of_kind("PodDisruptionBudget", values)["spec"]["selector"]["matchLabels"],
        *(one["spec"]["podSelector"]["matchLabels"] for one in render(values) if one["kind"] == "NetworkPolicy"),
        *(one["labelSelector"]["matchLabels"] for one in pod(values).get("topologySpreadConstraints", [])),
    ]
    for selector in selectors:
        assert selector.items() <= serving.items()
        assert not selector.items() <= testing.items()


@each_case
def test_ports_are_called_the_same_everywhere(values: Mapping[str, Any]) -> None:
    (port,) = container(values)["ports"]
    (served,) = of_kind("Service", values)["spec"]["ports"]
    assert port["name"] == served["targetPort"] == served["name"] == "http"
    assert str(port["containerPort"]) == environment(values)["LATENTD_PORT"]
    assert all(container(values)[f"{kind}Probe"]["httpGet"]["port"] == "http" for kind in ("startup", "readiness"))
    for one in render(values):
        if one["kind"] == "HTTPRoute":
            assert one["spec"]["rules"][0]["backendRefs"][0]["port"] == served["port"]
        if one["kind"] == "ServiceMonitor":
            assert one["spec"]["endpoints"][0]["port"] == "http"
            assert one["spec"]["selector"]["matchLabels"].items() <= of_kind("Service")["metadata"]["labels"].items()


@each_case
def test_variables_are_settings(values: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {name: text for name, text in environment(values).items() if name.startswith("LATENTD_")}
    assert {name.removeprefix("LATENTD_").lower() for name in ours} <= ServerSettings.model_fields.keys()
    for name, text in ours.items():
        monkeypatch.setenv(name, text)
    assert ServerSettings().host == "0.0.0.0"  # noqa: S104 - in a pod
    assert pod(values)["enableServiceLinks"] is False  # which would set LATENTD_PORT to an address


def test_settings_arrive_as_they_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also large numbers, of which Helm makes 1.048576e+06 if it is let."""
    for name, text in environment(SETTINGS).items():
        monkeypatch.setenv(name, text)
    settings = ServerSettings().model_dump(mode="json")
    assert {name: settings[name] for name in SETTINGS["settings"]} == SETTINGS["settings"]


@each_case
def test_containers_may_do_nothing_but_compute(values: Mapping[str, Any]) -> None:
    for spec in (pod(values), of_kind("Pod", values)["spec"]):
        assert spec["automountServiceAccountToken"] is False
        context = spec["securityContext"]
        assert (context["runAsNonRoot"], context["runAsUser"], context["runAsGroup"]) == (True, 10001, 10001)
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for one in containers(values):
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@each_case
def test_mounts_have_volumes_and_caches_a_place(values: Mapping[str, Any]) -> None:
    volumes = {volume["name"] for volume in pod(values)["volumes"]}
    used = {mount["name"] for one in containers(values) for mount in one.get("volumeMounts", [])}
    assert used == volumes
    writable = {mount["mountPath"] for mount in container(values)["volumeMounts"] if not mount.get("readOnly")}
    assert {environment(values)["XDG_CACHE_HOME"], "/tmp"} <= writable  # noqa: S108 - the pod's


def test_a_pod_has_one_gpu_and_none_in_a_trial() -> None:
    assert container()["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert pod()["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert container()["image"] == "latentd:0.1.0-cuda"
    trial = {"mode": "cpu"}
    assert "limits" not in container(trial)["resources"]
    assert "tolerations" not in pod(trial)
    assert container(trial)["image"] == "latentd:0.1.0"


def test_a_part_of_a_gpu() -> None:
    values = {"gpu": {"resource": "nvidia.com/mig-3g.40gb"}, "resources": {"limits": {"memory": "16Gi"}}}
    assert container(values)["resources"]["limits"] == {"memory": "16Gi", "nvidia.com/mig-3g.40gb": 1}


def test_a_digest_pins_the_image() -> None:
    assert container(POD)["image"] == f"example.com/latentd:0.1.0-cuda@sha256:{'0' * 64}"


def bundles(values: Mapping[str, Any]) -> Manifest | None:
    """How the server's container has the volume of bundles."""
    mounts = {mount["name"]: mount for mount in container(values)["volumeMounts"]}
    found: Manifest | None = mounts.get("bundles")
    return found


def test_models_are_folders_of_the_volume() -> None:
    assert environment(MODELS)["LATENTD_BUNDLE"] == "/models/sd15,anime=/models/more/other"
    volumes = {volume["name"]: volume for volume in pod(MODELS)["volumes"]}
    claim = of_kind("PersistentVolumeClaim", MODELS)
    assert volumes["bundles"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


@pytest.mark.parametrize(
    ("values", "compiles", "writable", "before"),
    [
        ({}, "true", True, ["demo"]),
        (MODELS, "true", True, []),
        (COMPILE_INIT, "false", False, ["compile"]),
        ({"compile": "init", **CLAIM}, "false", False, ["demo", "compile"]),
        ({"compile": "never", **MODELS}, "false", False, []),
        ({"mode": "cpu", **MODELS}, None, False, []),
    ],
    ids=["start, demo", "start", "init", "init, demo", "never", "cpu"],
)
def test_who_compiles_can_write_bundles(
    values: Mapping[str, Any], compiles: str | None, writable: bool, before: list[str]
) -> None:
    mount = bundles(values)
    assert mount
    assert mount["readOnly"] is not writable
    assert environment(values).get("LATENTD_COMPILE") == compiles
    assert [one["name"] for one in pod(values).get("initContainers", [])] == before


def test_the_init_container_compiles_each_model_on_the_gpu() -> None:
    (first,) = pod({**COMPILE_INIT, "settings": {"backend": "onnxruntime_cuda"}})["initContainers"]
    assert first["args"][1:] == ["compile", "onnxruntime_cuda", "/models/sd15", "/models/more/other"]
    assert first["resources"]["limits"] == {"nvidia.com/gpu": 1}


def test_keys_are_a_folder_so_that_they_can_be_exchanged() -> None:
    (mount,) = [mount for mount in container(EXISTING_KEYS)["volumeMounts"] if mount["name"] == "keys"]
    assert environment(EXISTING_KEYS)["LATENTD_API_KEYS"] == f"{mount['mountPath']}/keys.toml"
    assert "subPath" not in mount  # which Kubernetes never updates


def test_loras_are_read_only() -> None:
    (mount,) = [mount for mount in container(LORAS)["volumeMounts"] if mount["name"] == "loras"]
    assert environment(LORAS)["LATENTD_LORAS"] == mount["mountPath"]
    assert (mount["readOnly"], mount["subPath"]) == (True, "loras")
