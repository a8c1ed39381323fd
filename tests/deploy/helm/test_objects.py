"""What is around the pods: evictions, scaling, monitoring, and ways in."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import ROOT
from tests.deploy.helm.cases import CASES, EXISTING_KEYS, HPA, INGRESS, KEDA, MONITORING, MONITORS, POLICY, ROUTE
from tests.deploy.helm.chart import CHART, NAME, NAMESPACE, Manifest, of_kind
from tests.support.programs import program

ALERTS = ROOT / "deploy/prometheus/alerts.yml"
METRIC = re.compile(r"\blatentd_\w+")


def spec(kind: str, values: Mapping[str, Any] | None = None) -> Manifest:
    found: Manifest = of_kind(kind, values)["spec"]
    return found


@pytest.mark.parametrize("replicas", [1, 4])
def test_a_node_can_be_drained(replicas: int) -> None:
    """With minAvailable: 1 the only replica could never be evicted."""
    budget = spec("PodDisruptionBudget", {"replicas": replicas})
    assert budget["maxUnavailable"] == 1
    assert "minAvailable" not in budget


@pytest.mark.parametrize("values", [KEDA, HPA], ids=["keda", "hpa"])
def test_what_scales_pods_is_not_undone_by_an_upgrade(values: Mapping[str, Any]) -> None:
    assert "replicas" not in spec("Deployment", values)
    assert spec("Deployment")["replicas"] == 1


def test_keda_asks_for_open_requests_of_these_pods() -> None:
    scaled = spec("ScaledObject", KEDA)
    (trigger,) = scaled["triggers"]
    query = trigger["metadata"]["query"]
    assert scaled["scaleTargetRef"]["name"] == of_kind("Deployment", KEDA)["metadata"]["name"]
    assert query.count(f'{{namespace="{NAMESPACE}",service="{NAME}"}}') == len(METRIC.findall(query)) == 3
    assert of_kind("Service", KEDA)["metadata"]["name"] == NAME  # the label `service` of what is scraped
    assert (trigger["metricType"], trigger["metadata"]["threshold"]) == ("AverageValue", "2")
    assert trigger["metadata"]["ignoreNullValues"] == "false"  # an unreachable Prometheus removes no pod


def test_the_query_is_of_metrics_that_exist_and_of_prometheus_language(metric_names: set[str], tmp_path: Path) -> None:
    query = spec("ScaledObject", KEDA)["triggers"][0]["metadata"]["query"]
    assert {*METRIC.findall(query)} <= metric_names
    rules = {"groups": [{"name": "scaling", "rules": [{"record": "open", "expr": query}]}]}
    promtool(tmp_path, "check", rules)


def test_the_query_counts_waiting_running_and_decoding_requests_of_this_release(tmp_path: Path) -> None:
    """Evaluated by Prometheus: two pods with 6 + 8 + 1 and 0 + 5 + 0, beside those of another release."""
    query = spec("ScaledObject", KEDA)["triggers"][0]["metadata"]["query"]
    states = ("waiting", "running", "decoding")
    pods = {
        (NAME, "10.0.0.1:8000"): (6, 8, 1),
        (NAME, "10.0.0.2:8000"): (0, 5, 0),
        ("other", "10.0.0.3:8000"): (9, 9, 9),
    }
    series = [
        {
            "series": f'latentd_requests_{state}{{namespace="{NAMESPACE}",service="{service}",instance="{pod}"}}',
            "values": f"{n}",
        }
        for (service, pod), counts in pods.items()
        for state, n in zip(states, counts, strict=True)
    ]
    expected = {"expr": query, "eval_time": "0m", "exp_samples": [{"labels": "{}", "value": 20}]}
    tests = {"rule_files": [], "tests": [{"input_series": series, "promql_expr_test": [expected]}]}
    promtool(tmp_path, "test", tests)


def test_a_horizontal_pod_autoscaler_uses_the_adapter_s_metric(metric_names: set[str]) -> None:
    (metric,) = spec("HorizontalPodAutoscaler", HPA)["metrics"]
    document = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(rules:\n.*?)```", document, re.DOTALL)
    (rule,) = yaml.safe_load(block)["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert {*METRIC.findall(rule["metricsQuery"])} | {*METRIC.findall(rule["seriesQuery"])} <= metric_names


@pytest.mark.parametrize("values", [KEDA, HPA], ids=["keda", "hpa"])
def test_pods_are_added_at_once_and_removed_slowly(values: Mapping[str, Any]) -> None:
    if values is KEDA:
        behavior = spec("ScaledObject", KEDA)["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    else:
        behavior = spec("HorizontalPodAutoscaler", HPA)["behavior"]
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 0
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] == 600
    assert [policy["value"] for policy in behavior["scaleDown"]["policies"]] == [1]


def test_the_alerts_are_those_of_prometheus(tmp_path: Path) -> None:
    rendered = spec("PrometheusRule", MONITORING)
    assert rendered == yaml.safe_load(ALERTS.read_text(encoding="utf-8"))
    assert (CHART / "files/alerts.yml").is_symlink()
    assert (CHART / "files/alerts.yml").resolve() == ALERTS
    promtool(tmp_path, "check", rendered)


def promtool(folder: Path, what: str, contents: Mapping[str, Any]) -> None:
    """Have Prometheus `check` rules, or `test` queries."""
    file = folder / "rules.yml"
    file.write_text(json.dumps(contents), encoding="utf-8")
    command = [program("promtool"), what, "rules", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603 - Prometheus'
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_scrapes_with_the_key_of_an_administrator() -> None:
    (endpoint,) = spec("ServiceMonitor", {**MONITORING, **EXISTING_KEYS})["endpoints"]
    assert endpoint["path"] == "/metrics"
    assert endpoint["authorization"] == {"type": "Bearer", "credentials": {"name": "admin", "key": "key"}}
    assert of_kind("ServiceMonitor", MONITORING)["metadata"]["labels"]["release"] == "prometheus"


def test_alerts_know_the_job_whatever_the_release_is_called() -> None:
    values = {**MONITORING, "fullnameOverride": "images"}
    label = spec("ServiceMonitor", values)["jobLabel"]
    job = of_kind("Service", values)["metadata"]["labels"][label]
    expressions = [rule["expr"] for group in spec("PrometheusRule", values)["groups"] for rule in group["rules"]]
    patterns = {pattern for text in expressions for pattern in re.findall(r'\bjob=~?"([^"]*)"', text)}
    assert patterns
    assert all(re.fullmatch(pattern, job) for pattern in patterns)


def test_a_network_policy_lets_in_who_is_named_and_nothing_out_by_default() -> None:
    policy = spec("NetworkPolicy", POLICY)
    assert policy["ingress"][0]["from"] == [{"podSelector": {}}, MONITORS]
    assert policy["ingress"][0]["ports"] == [{"port": "http"}]
    assert spec("NetworkPolicy", {"networkPolicy": {"enabled": True}})["egress"] == []
    assert policy["policyTypes"] == ["Ingress", "Egress"]


def test_an_ingress_passes_streams_and_uploads_on() -> None:
    ingress = of_kind("Ingress", INGRESS)
    options = {name.rpartition("/")[2]: value for name, value in ingress["metadata"]["annotations"].items()}
    assert options["proxy-buffering"] == "off"
    assert options["proxy-body-size"] == "34m"  # as much as the server takes
    (rule,) = ingress["spec"]["rules"]
    assert ingress["spec"]["tls"] == [{"hosts": [rule["host"]], "secretName": "images-tls"}]
    assert rule["http"]["paths"][0]["backend"]["service"] == {"name": NAME, "port": {"name": "http"}}


def test_a_route_has_no_time_limit() -> None:
    (rule,) = spec("HTTPRoute", ROUTE)["rules"]
    assert rule["timeouts"] == {"request": "0s"}
    assert rule["backendRefs"][0]["name"] == of_kind("Service", ROUTE)["metadata"]["name"]


def test_the_service_account_has_no_token() -> None:
    account = of_kind("ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    assert of_kind("Deployment", CASES["everything"])["spec"]["template"]["spec"]["serviceAccountName"] == NAME
