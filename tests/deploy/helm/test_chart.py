"""The chart renders, and Kubernetes would accept what it renders: by its schemas, offline; no cluster is asked."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import ROOT
from tests.deploy.helm.cases import CASES
from tests.deploy.helm.chart import CHART, NAME, NAMESPACE, Manifest, helm, kinds, of_kind, render
from tests.deploy.helm.schemas import NEWEST, problems

OLDEST = "1.30"  # which the chart supports

each_case = pytest.mark.parametrize("values", CASES.values(), ids=CASES)


def about(path: str = "Chart.yaml") -> Manifest:
    chart: Manifest = yaml.safe_load((CHART / path).read_text(encoding="utf-8"))
    return chart


@pytest.mark.parametrize("name", ["default", "everything"])
def test_helm_lint_finds_nothing(name: str) -> None:
    done = helm("lint", "--strict", CHART, values=CASES[name])
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@each_case
def test_objects_are_valid(values: Mapping[str, Any], version: str) -> None:
    assert [problem for one in render(values) for problem in problems(one, version)] == []


@pytest.mark.parametrize(
    ("kind", "path", "wrong"),
    [
        ("Deployment", ("template", "spec", "restartPolicies"), "Never"),
        ("ScaledObject", ("pollingIntervall",), 3),
        ("ServiceMonitor", ("endpoints",), [{"port": 8000}]),
        ("PrometheusRule", ("groups",), [{"name": "x", "rules": [{"alert": "x"}]}]),
        ("HTTPRoute", ("rules",), [{"timeout": "0s"}]),
    ],
)
def test_the_schemas_find_mistakes(kind: str, path: tuple[str, ...], wrong: object) -> None:
    """A check that could not fail would say nothing."""
    found = {**of_kind(kind, CASES["everything"])}
    *outer, last = path
    place = found["spec"] = {**found["spec"]}
    for name in outer:
        place[name] = {**place[name]}
        place = place[name]
    place[last] = wrong
    assert problems(found)


@each_case
def test_names_and_namespaces(values: Mapping[str, Any]) -> None:
    manifests = render(values)
    names = [(one["kind"], one["metadata"]["name"]) for one in manifests]
    assert len(set(names)) == len(names)
    assert {one["metadata"]["namespace"] for one in manifests} == {NAMESPACE}
    assert all(name.startswith(NAME) for _, name in names)


def test_an_installation_makes_no_more_than_it_needs() -> None:
    assert kinds() == {"Deployment", "Service", "ServiceAccount", "PodDisruptionBudget", "Pod"}
    assert len(kinds(CASES["everything"])) == 13


def test_the_chart_s_version_is_the_project_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert about()["version"] == about()["appVersion"] == project["version"]
    assert about()["kubeVersion"].startswith(f">={OLDEST}")


def test_an_older_kubernetes_is_refused() -> None:
    """It would ignore preStop.sleep, and stop pods that still get requests."""
    done = helm("template", "try", CHART, "--kube-version", "1.29.0")
    assert "incompatible with Kubernetes v1.29.0" in done.stderr


def test_names_of_long_releases_fit() -> None:
    done = helm("template", "a" * 53, CHART, values=CASES["everything"])
    names = [one["metadata"]["name"] for one in yaml.safe_load_all(done.stdout) if one]
    assert names
    assert max(map(len, names)) <= 63


def test_recreating_pods_leaves_no_rolling_update() -> None:
    """Kubernetes refuses both together, which its schema does not know."""
    assert of_kind("Deployment", CASES["recreate"])["spec"]["strategy"] == {"type": "Recreate"}


def test_a_packaged_chart_has_the_alerts(tmp_path: Path) -> None:
    """They are a link to those of deploy/prometheus, of which a package has the contents."""
    done = helm("package", CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("*.tgz")
    assert yaml.safe_load(helm("template", "try", package, "--set", "monitoring.rules=true",
                               "--show-only", "templates/prometheusrule.yaml").stdout)["spec"]["groups"]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "There are no API keys"),
        ({}, "Engines end with each pod"),
        (CASES["existing-keys"], "-H 'Authorization: Bearer KEY'"),
        ({"replicas": 2, "bundles": {"claim": {"create": True}}}, "All pods must run on one node"),
        (CASES["claim"], "Engines are for one GPU model"),
    ],
)
def test_the_notes_say_what_to_do_next(values: Mapping[str, Any], said: str) -> None:
    done = helm("install", "try", CHART, "--dry-run=client", values=values)
    assert said in done.stdout.split("NOTES:")[1], done.stderr
    assert "curl " in done.stdout
