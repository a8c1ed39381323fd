"""Write the server's settings into the schema of the Helm chart, and the schema as a table into docs/kubernetes.md.

python -m tests.tools.helm_values
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from server.startup.settings import ServerSettings
from tests import ROOT

CHART = ROOT / "deploy/helm/latentd"
SCHEMA = CHART / "values.schema.json"
DOCUMENT = ROOT / "docs/kubernetes.md"
# Settings that follow from other values of the chart.
OF_THE_CHART = frozenset({"api_keys", "bundle", "compile", "drain_seconds", "host", "loras", "port"})
_TABLE = re.compile(r"(?<=<!-- values -->\n).*(?=<!-- end of values -->)", re.DOTALL)
_HEAD = "| value | default | |\n|---|---|---|\n"


def settings() -> dict[str, Any]:
    """The schema of the value `settings`."""
    described = ServerSettings.model_json_schema()["properties"]
    return {
        "description": "settings of the server by their names with underscores, such as `max_waiting: 16`: "
        "[all of them](operation.md#settings) but those that follow from other values",
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _setting(of) for name, of in described.items() if name not in OF_THE_CHART},
    }


def _setting(described: Mapping[str, Any]) -> dict[str, Any]:
    """A setting without its default, which is the server's; one that may be unset is left out for that."""
    kept = {key: value for key, value in described.items() if key not in {"anyOf", "default", "title"}}
    kinds = [kind for kind in described.get("anyOf", []) if kind != {"type": "null"}]
    kept.update(kinds[0] if kinds else {})
    if kept.get("type") == "array":
        kept |= {"minItems": 1, "items": {"type": "string", "pattern": "^[^,]+$"}}
    kept.pop("format", None)
    return kept


def with_settings(schema: Mapping[str, Any]) -> dict[str, Any]:
    """`schema` with the settings of this version of the server."""
    return {**schema, "properties": {**schema["properties"], "settings": settings()}}


def table(schema: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The values as Markdown."""
    return _HEAD + "".join(_rows(schema["properties"], defaults, ""))


def _rows(properties: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, about in properties.items():
        if name == "global":
            continue
        if "properties" in about and not about["description"]:
            yield from _rows(about["properties"], defaults[name], f"{prefix}{name}.")
        else:
            yield f"| `{prefix}{name}` | {_default(defaults[name])} | {about['description']} |\n"


def _default(value: Any) -> str:
    if value in ("", [], {}):
        return ""
    if isinstance(value, dict) and len(json.dumps(value)) > 60:
        return "see `values.yaml`"
    return f"`{value if isinstance(value, str) else _flow(value)}`"


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    return str(yaml.safe_dump(value, default_flow_style=True, width=1000)).removesuffix("...\n").strip()


def with_table(document: str, rows: str) -> str:
    """`document` with `rows` in place of its table of values."""
    return _TABLE.sub(lambda _: rows, document)


def defaults() -> dict[str, Any]:
    """The values of the chart."""
    values: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    return values


def main() -> None:
    """Write both."""
    schema = with_settings(json.loads(SCHEMA.read_text(encoding="utf-8")))
    SCHEMA.write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    document = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(with_table(document, table(schema, defaults())), encoding="utf-8")


if __name__ == "__main__":
    main()
