"""Documents name what exists: links, anchors, files of the repository, modules and scripts in commands."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from tests import ROOT

TOPS = ("benchmarks", "deploy", "docs", "engines", "loadtest", "scripts", "server", "tests")
EXTERNAL = {"uvicorn", "pytest", "pip", "venv"}  # modules of other projects that commands run
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
MODULE = re.compile(r"\bpython[\d.]* -m ([a-z_][\w.]*)")
SCRIPT = re.compile(r"(?<![\w./-])((?:scripts|\.ci)/[\w.-]*[\w-])")
COMMAND = re.compile(r"^(?:sudo )?(python[\d.]*|latentd|locust|pip)\b", re.MULTILINE)  # of no virtual environment
PATH = re.compile(rf"(?:{'|'.join(TOPS)})(?:/[\w.-]+)*/?|[\w-]+\.(?:py|md|toml)")


def documents() -> list[Path]:
    inside = [path for top in TOPS for path in (ROOT / top).rglob("*.md")]
    return sorted([*ROOT.glob("*.md"), *(path for path in inside if "node_modules" not in path.parts)])


DOCUMENTS = documents()
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@each_document
def test_no_merge_is_left_open(document: Path) -> None:
    assert not re.search(r"^(<{7}|>{7}) ", document.read_text(encoding="utf-8"), re.MULTILINE)


def prose(document: Path) -> str:
    return FENCE.sub("", document.read_text(encoding="utf-8"))


@cache
def anchors(document: Path) -> set[str]:
    """The fragments that GitHub gives to the headings of `document`."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@each_document
def test_links_lead_to_files_and_headings(document: Path) -> None:
    links = [link for link in LINK.findall(prose(document)) if "://" not in link]
    for target, _, fragment in (link.partition("#") for link in links):
        file = (document.parent / target).resolve() if target else document
        assert file.exists(), target
        assert not fragment or fragment in anchors(file), f"{target}#{fragment}"


@each_document
def test_paths_in_code_spans_exist(document: Path) -> None:
    """From the repository's root, or from the document's own folder; a bare file name anywhere in the repository."""
    spans = [span for span in CODE.findall(prose(document)) if PATH.fullmatch(span)]
    names = {path.name for top in TOPS for path in (ROOT / top).rglob("*.*")} | {path.name for path in ROOT.glob("*.*")}
    missing = [
        span
        for span in spans
        if not (ROOT / span).exists() and not (document.parent / span).exists() and span not in names
    ]
    assert not missing


@each_document
def test_commands_name_modules_and_scripts_that_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    modules = {name.rstrip(".") for name in MODULE.findall(text)} - EXTERNAL
    assert not [name for name in modules if not is_module(name)]
    assert not [script for script in SCRIPT.findall(text) if not (ROOT / script).is_file()]


@each_document
def test_commands_run_in_the_virtual_environment(document: Path) -> None:
    """A fresh clone has its packages in .venv alone, and the package is not published."""
    commands = "".join(FENCE.findall(document.read_text(encoding="utf-8")))
    assert not [command for command in COMMAND.findall(commands) if command != "python3.11"]
    assert "pip install 'latentd" not in document.read_text(encoding="utf-8")
