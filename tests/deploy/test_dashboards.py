"""Dashboards, alerts and the queries of documents name metrics and labels that a running server has."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from engines.demo import BUNDLE
from server.runtime.monitoring.gpu import GpuMetrics
from server.runtime.monitoring.metrics import Metrics
from tests import ROOT
from tests.server.runtime.monitoring.fake_nvml import GPU, FakeNvml
from tests.support.promql import document_queries
from tests.support.serving import Serving

DASHBOARD = json.loads((ROOT / "deploy/grafana/latentd.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8"))
PROMETHEUS = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))

PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
EXPRESSIONS = [*QUERIES, *(rule["expr"] for rule in RULES), *document_queries()]

METRIC = re.compile(r"\b(?:(?:latentd|process)_\w+|up\b)")
SELECTOR = re.compile(r"\b((?:latentd|process)_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|without) \(([^)]*)\)")
OF_PROMETHEUS = {"instance", "job"}  # labels that it adds


@pytest.fixture(scope="module")
def series() -> Mapping[str, list[dict[str, str]]]:
    """The labels of each series of a server that has made an image, by name."""
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    with Serving(BUNDLE) as serving:
        assert serving.generate(prompt="a red heart", num_inference_steps=1).status_code == 200
        for family in text_string_to_metric_families(serving.client.get("/metrics").text):
            for sample in family.samples:
                found[sample.name].append(sample.labels)
    for family in text_string_to_metric_families(of_gpus()):
        for sample in family.samples:
            found[sample.name].append(sample.labels)
    found["up"].append({})  # Prometheus adds it to every target
    return found


def of_gpus() -> str:
    """The metrics of a server on a GPU, which add some series."""
    metrics = Metrics(max_rows=2)
    metrics.watch_captures(lambda: {"denoise": 0})
    metrics.add_collector(GpuMetrics(GPU, FakeNvml()))
    return metrics.render().decode()


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_metrics_labels_and_values_exist(series: Mapping[str, list[dict[str, str]]], expression: str) -> None:
    names = METRIC.findall(expression)
    assert names
    assert not [name for name in names if name not in series]
    labels = {label for name in names for one in series[name] for label in one} | OF_PROMETHEUS
    grouped = {label.strip() for text in GROUPING.findall(expression) for label in text.split(",")}
    assert grouped <= labels
    for name, matchers in SELECTOR.findall(expression):
        for label, value in MATCHER.findall(matchers):
            if label not in OF_PROMETHEUS:
                assert set(value.split("|")) <= {one.get(label) for one in series[name]}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_brackets_are_closed_and_quantiles_have_their_buckets(expression: str) -> None:
    bare = re.sub(r'"[^"]*"', "", expression)
    for opening, closing in ("()", "[]", "{}"):
        assert bare.count(opening) == bare.count(closing)
    assert ("histogram_quantile" in expression) == ("_bucket" in expression) == bool(re.search(r"\(.*\ble\b", bare))


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_is_of_the_chosen_instances(query: str) -> None:
    assert all('instance=~"$instance"' in matchers for _, matchers in SELECTOR.findall(query))


def test_legends_name_labels_of_the_result(series: Mapping[str, list[dict[str, str]]]) -> None:
    for target in (target for panel in PANELS for target in panel["targets"]):
        (name, *_) = METRIC.findall(target["expr"])
        labels = {label for one in series[name] for label in one} | OF_PROMETHEUS
        if grouping := GROUPING.findall(target["expr"]):
            labels = {label.strip() for label in grouping[0].split(",")}
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels


def test_panels_have_an_id_a_title_and_a_place_of_their_own() -> None:
    for key in ("id", "title"):
        assert max(Counter(panel[key] for panel in PANELS).values()) == 1
    assert not [panel["title"] for panel in PANELS if not panel["description"].endswith(".")]
    cells = Counter(cell for panel in PANELS for cell in cells_of(panel["gridPos"]))
    assert max(cells.values()) == 1, "panels overlap"
    assert {x for x, _ in cells} == set(range(24))


def cells_of(place: Mapping[str, int]) -> Iterator[tuple[int, int]]:
    for x in range(place["x"], place["x"] + place["w"]):
        yield from ((x, y) for y in range(place["y"], place["y"] + place["h"]))


def test_variables_are_defined() -> None:
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(PANELS))) - {"__rate_interval"}
    assert used == defined
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}


def test_prometheus_reads_the_alerts() -> None:
    assert PROMETHEUS["rule_files"] == ["alerts.yml"]
    assert PROMETHEUS["scrape_configs"][0]["static_configs"][0]["targets"] == ["127.0.0.1:8000"]
    assert max(Counter(rule["alert"] for rule in RULES).values()) == 1
    assert all(rule["annotations"]["summary"] and rule["labels"]["severity"] for rule in RULES)
