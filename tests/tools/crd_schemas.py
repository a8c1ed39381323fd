"""Write the JSON Schemas of custom resources that tests of the Helm chart use, from packages with models of them.

pip install --target models \\
    cloudcoil==0.6.0 cloudcoil-models-keda==2.16.1.0 cloudcoil-models-prometheus-operator==0.80.1.0
PYTHONPATH=models .venv/bin/python -m tests.tools.crd_schemas

The models take seconds to import, so the schemas are in the repository. A field that they do not name is refused, as by
`kubectl apply`, which validates strictly.
"""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

from tests import ROOT

FOLDER = ROOT / "tests/deploy/helm/schemas"
MODELS = {
    "ScaledObject": "cloudcoil.models.keda.v1alpha1",
    "ServiceMonitor": "cloudcoil.models.prometheus_operator.v1",
    "PrometheusRule": "cloudcoil.models.prometheus_operator.v1",
}


def schema_of(kind: str) -> dict[str, Any]:
    """The schema of the specification of `kind`."""
    model = getattr(import_module(MODELS[kind]), f"{kind}Spec")
    schema: dict[str, Any] = _strict(model.model_json_schema())
    return schema


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` without titles, defaults and null, where only fields that it names are allowed."""
    kept = {name: _inner(name, value) for name, value in schema.items() if name not in {"title", "default"}}
    choices = [one for one in kept.pop("anyOf", []) if one != {"type": "null"}]
    if "properties" in kept:
        kept["additionalProperties"] = False
    if len(choices) > 1:
        kept["anyOf"] = choices
    return kept | choices[0] if len(choices) == 1 else kept


def _inner(name: str, value: Any) -> Any:
    if name in {"properties", "$defs"}:
        return {key: _strict(one) for key, one in value.items()}
    if name == "anyOf":
        return [_strict(one) for one in value]
    if name in {"items", "additionalProperties"} and isinstance(value, dict):
        return _strict(value)
    return value


def main() -> None:
    """Write all."""
    for kind in MODELS:
        text = json.dumps(schema_of(kind), indent=1, sort_keys=True)
        (FOLDER / f"{kind.lower()}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
