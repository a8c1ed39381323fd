"""Values that cannot work are refused with a reason, and what is said of values is current."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from server.startup.settings import ServerSettings
from tests.deploy.helm.cases import EXISTING_KEYS, RENDERED_KEYS
from tests.deploy.helm.chart import refusal, render
from tests.tools import helm_values

SCHEMA: dict[str, Any] = json.loads(helm_values.SCHEMA.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replica": 2}, "additional properties 'replica' not allowed"),
        ({"image": {"name": "x"}}, "/image': additional properties 'name' not allowed"),
        ({"mode": "tpu"}, "/mode': value must be one of 'gpu', 'cpu'"),
        ({"image": {"digest": "sha256:1"}}, "/image/digest': 'sha256:1' does not match"),
        ({"settings": {"max_wating": 4}}, "/settings': additional properties 'max_wating' not allowed"),
        ({"settings": {"port": 80}}, "/settings': additional properties 'port' not allowed"),
        ({"settings": {"threads": -1}}, "/settings/threads': minimum: got -1, want 0"),
        ({"settings": {"load": []}}, "/settings/load': minItems: got 0, want 1"),
        ({"settings": {"log_level": "loud"}}, "/settings/log_level': value must be one of"),
        ({"models": [{"path": "../elsewhere"}]}, "/models/0/path': '../elsewhere' does not match"),
        ({"models": [{"path": "a,b"}]}, "/models/0/path': 'a,b' does not match"),
        ({"bundles": {"claim": {"size": "many"}}}, "/bundles/claim/size': 'many' does not match"),
        ({"stopping": {"drainSeconds": "60"}}, "/stopping/drainSeconds': got string, want integer"),
        ({"autoscaling": {"minReplicas": 0}}, "/autoscaling/minReplicas': minimum: got 0, want 1"),
        ({"service": {"port": 70000}}, "/service/port': maximum: got 70,000, want 65,535"),
        ({"models": [{"path": "sd15"}]}, "set bundles.existingClaim, or bundles.claim.create"),
        ({"autoscaling": {"kind": "keda"}}, "set autoscaling.prometheus to the address of Prometheus"),
        ({"autoscaling": {"minReplicas": 5}}, "autoscaling.minReplicas is 5 and autoscaling.maxReplicas 4"),
        ({"apiKeys": {**EXISTING_KEYS["apiKeys"], **RENDERED_KEYS["apiKeys"]}}, "both set: remove one of them"),
        ({**EXISTING_KEYS, "monitoring": {"serviceMonitor": True}}, "set monitoring.keySecret"),
        ({"ingress": {"enabled": True}}, "set ingress.host to the name"),
        ({"httpRoute": {"enabled": True}}, "set httpRoute.parentRefs to the Gateway"),
        ({"extraEnv": [{"name": "LATENTD_PORT", "value": "1"}]}, "settings of the server belong to settings"),
    ],
)
def test_values_that_cannot_work_are_refused(values: Mapping[str, Any], said: str) -> None:
    assert said in refusal(values)


def objects(schema: Mapping[str, Any], path: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    """The objects of a schema that name their fields, by their paths."""
    found = [(path, schema)] if "properties" in schema else []
    for name, inner in schema.get("properties", {}).items():
        found += objects(inner, f"{path}.{name}")
    return found + (objects(schema["items"], f"{path}[]") if "items" in schema else [])


def test_the_schema_is_strict() -> None:
    open_ended = {path for path, one in objects(SCHEMA) if one.get("additionalProperties") is not False}
    assert open_ended == {".extraEnv[]"}  # has valueFrom, of many kinds


def test_every_value_is_described() -> None:
    rows = helm_values.table(SCHEMA, helm_values.defaults()).splitlines()[2:]
    assert not [row for row in rows if row.endswith("|  |")]


def test_every_value_has_a_default_and_none_is_unknown() -> None:
    defaults = helm_values.defaults()
    assert SCHEMA["properties"].keys() - {"global"} == defaults.keys()
    for name, one in SCHEMA["properties"].items():
        if "properties" in one and name not in {"settings", "strategy"}:
            assert one["properties"].keys() == defaults[name].keys()


def test_every_setting_is_a_value_or_follows_from_one() -> None:
    offered = SCHEMA["properties"]["settings"]["properties"].keys()
    assert offered | helm_values.OF_THE_CHART == ServerSettings.model_fields.keys()
    assert not offered & helm_values.OF_THE_CHART


def test_schema_and_table_are_current() -> None:
    document = helm_values.DOCUMENT.read_text(encoding="utf-8")
    rows = helm_values.table(SCHEMA, helm_values.defaults())
    assert helm_values.with_settings(SCHEMA) == SCHEMA, "python -m tests.tools.helm_values"
    assert document == helm_values.with_table(document, rows), "python -m tests.tools.helm_values"
    assert len(re.findall(r"^\| `", document, re.MULTILINE)) > 60


def examples() -> list[dict[str, Any]]:
    """The values that docs/kubernetes.md shows as YAML."""
    blocks = re.findall(
        r"^```yaml\n(.*?)^```", helm_values.DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return [values for values in map(yaml.safe_load, blocks) if "rules" not in values]  # those of prometheus-adapter


@pytest.mark.parametrize("values", examples(), ids=", ".join)
def test_examples_render(values: Mapping[str, Any]) -> None:
    assert render(values)


def test_flags_in_commands_are_values() -> None:
    text = helm_values.DOCUMENT.read_text(encoding="utf-8")
    named = re.findall(r"--set ([\w.]+)=", text)
    assert len(named) > 5
    for name in named:
        schema = SCHEMA
        for part in name.split("."):
            schema = schema["properties"][part] if "properties" in schema else schema["additionalProperties"]
        assert schema
