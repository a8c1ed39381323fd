"""The schemas that rendered objects are checked with: Kubernetes' own, and those of custom resources.

Kubernetes' come with the package kubernetes-validate, in their strict form: fields that do not exist are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from tests.deploy.helm.chart import Manifest

NEWEST = "1.37"
_FOLDER = Path(__file__).with_name("schemas")


def problems(manifest: Manifest, version: str = NEWEST) -> list[str]:
    """What is wrong with an object, by its schema in Kubernetes `version`."""
    custom = _FOLDER / f"{manifest['kind'].lower()}.json"
    if custom.exists():
        metadata = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest["metadata"]}
        return [*problems(metadata, version), *_errors(_custom(custom), manifest["spec"])]
    return list(_errors(_validator(manifest["apiVersion"], manifest["kind"], version), manifest))


def _errors(validator: Draft202012Validator, instance: Any) -> Iterator[str]:
    for error in validator.iter_errors(instance):
        yield f"{error.json_path}: {error.message}"


@cache
def _custom(path: Path) -> Draft202012Validator:
    return Draft202012Validator(json.loads(path.read_text(encoding="utf-8")))


@cache
def _validator(api: str, kind: str, version: str) -> Draft202012Validator:
    """The validator of a kind; its file's name has the first label of the group."""
    group, _, number = api.rpartition("/")
    suffix = f"{group.split('.')[0]}-{number}" if group else number
    return Draft202012Validator(_load(version, f"{kind.lower()}-{suffix}.json"), registry=_definitions(version))


@cache
def _definitions(version: str) -> Registry[Any]:
    registry: Registry[Any] = Registry()
    return Resource.from_contents(_load(version, "_definitions.json")) @ registry


def _load(version: str, name: str) -> dict[str, Any]:
    pytest.importorskip("kubernetes_validate")
    folder = files("kubernetes_validate") / f"kubernetes-json-schema/v{version}.0-local-strict"
    contents: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return contents
