"""Renders the chart, and finds what is in the result."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests import ROOT
from tests.support.programs import program

CHART = ROOT / "deploy/helm/latentd"
NAMESPACE = "images"
RELEASE = "try"
NAME = "try-latentd"  # of most objects

Manifest = dict[str, Any]


def helm(*arguments: str | Path, values: Mapping[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run Helm; `values` are given as a file."""
    words: list[str | Path] = [program("helm", installed_by="scripts/helm"), *arguments]
    if values is not None:
        words += ["--values", "-"]
    return subprocess.run(words, input=json.dumps(values), capture_output=True, text=True, check=False, timeout=60)  # noqa: S603 - Helm


def render(values: Mapping[str, Any] | None = None) -> Sequence[Manifest]:
    """The objects that an installation with `values` makes."""
    return _render(json.dumps(values or {}))


@cache
def _render(values: str) -> Sequence[Manifest]:
    done = helm("template", RELEASE, CHART, "--namespace", NAMESPACE, values=json.loads(values))
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.load_all(done.stdout, yaml.CSafeLoader) if one]


def refusal(values: Mapping[str, Any]) -> str:
    """What Helm says to `values` that are refused."""
    done = helm("template", RELEASE, CHART, values=values)
    assert done.returncode
    return done.stderr


def of_kind(kind: str, values: Mapping[str, Any] | None = None) -> Manifest:
    """The only object of `kind`."""
    (found,) = [one for one in render(values) if one["kind"] == kind]
    return found


def kinds(values: Mapping[str, Any] | None = None) -> set[str]:
    return {one["kind"] for one in render(values)}


def pod(values: Mapping[str, Any] | None = None) -> Manifest:
    """The specification of the server's pod."""
    spec: Manifest = of_kind("Deployment", values)["spec"]["template"]["spec"]
    return spec


def container(values: Mapping[str, Any] | None = None) -> Manifest:
    """The server's container."""
    (found,) = pod(values)["containers"]
    assert isinstance(found, dict)
    return found


def environment(values: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The variables of the server's container that have a value."""
    return {one["name"]: one["value"] for one in container(values)["env"] if "value" in one}
