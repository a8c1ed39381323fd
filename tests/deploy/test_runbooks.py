"""Every alert has its runbook, and Prometheus parses the queries of the documents for operators."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests import ROOT
from tests.support.programs import program
from tests.support.promql import document_queries

RUNBOOKS = ROOT / "docs/operating/runbooks.md"
PARTS = ("**Means**", "**Look**", "**Do**", "**Escalate**")

ALERTS: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]


def sections() -> dict[str, str]:
    """What a runbook says, by its heading."""
    _, *parts = re.split(r"^## ", RUNBOOKS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {title: body for title, _, body in (part.partition("\n") for part in parts)}


def test_each_alert_names_its_runbook() -> None:
    """A relative path, as a repository has no URL of its own; GitHub's anchor of a heading is its lower case."""
    where = RUNBOOKS.relative_to(ROOT)
    named = {rule["alert"]: rule["annotations"]["runbook"] for rule in ALERTS}
    assert named == {name: f"{where}#{name.lower()}" for name in sections()}


def test_each_runbook_says_what_it_means_where_to_look_what_to_do_and_when_to_escalate() -> None:
    for name, body in sections().items():
        assert [body.count(part) for part in PARTS] == [1] * 4, name
        assert sorted(PARTS, key=body.index) == list(PARTS), name


def test_the_table_lists_all_with_their_severity() -> None:
    rows = re.findall(r"^\| \[(\w+)\]\(#(\w+)\) \| (\w+) \|", RUNBOOKS.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [(rule["alert"], rule["alert"].lower(), rule["labels"]["severity"]) for rule in ALERTS]


def test_prometheus_parses_the_queries_of_the_documents(tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(document_queries())]
    assert rules
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}), encoding="utf-8")
    command = [program("promtool"), "check", "rules", str(file)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 - promtool
    assert checked.returncode == 0, checked.stdout + checked.stderr
