"""What checks images and prompts is found at the start, or its absence ends it with what to do."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from engines.errors import EngineError
from engines.manifest import Manifest
from server.runtime.pipeline.opennsfw import OpenNsfw
from server.runtime.pipeline.safety import Mode
from server.startup import safety
from server.startup.safety import choose_safety, load_prompt_check
from tests.support import prompt_checks


@pytest.fixture
def without_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safety, "is_installed", lambda: False)


@pytest.mark.usefixtures("without_extra")
@pytest.mark.parametrize(("asked", "chosen"), [(None, "flag"), ("off", "off"), ("flag", "flag"), ("block", "block")])
def test_the_checker_of_the_bundle_flags_by_default(checked_bundle: Path, asked: Mode | None, chosen: Mode) -> None:
    found = choose_safety(asked, Manifest.read(checked_bundle))
    assert (found.mode, found.classify) == (chosen, None)
    assert found.runs_graph == (chosen != "off")
    assert found.blocks == (chosen == "block")


@pytest.mark.parametrize("asked", [None, "off"])
def test_without_a_checker_nothing_is_checked_by_default(manifest: Manifest, asked: Mode | None) -> None:
    """Whether the extra is installed or not."""
    found = choose_safety(asked, manifest)
    assert (found.mode, found.classify, found.runs_graph) == ("off", None, False)


def test_the_extra_checks_where_that_is_asked_for(manifest: Manifest) -> None:
    found = choose_safety("block", manifest)
    assert isinstance(found.classify, OpenNsfw)
    assert not found.runs_graph


@pytest.mark.usefixtures("without_extra")
@pytest.mark.parametrize("asked", ["flag", "block"])
def test_a_check_that_nothing_can_do_is_refused(manifest: Manifest, asked: Mode) -> None:
    with pytest.raises(EngineError, match=rf"--safety {asked} needs a safety checker.*\[safety\].*safety_checker"):
        choose_safety(asked, manifest)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nowhere.checks:f", "No module named 'nowhere'"),
        ("tests.support.prompt_checks", "AttributeError|no attribute"),
        ("tests.support.prompt_checks:refuse_cars", "no attribute 'refuse_cars'"),
        ("os.path:join", None),
        ("os:getcwd", "too many positional arguments"),
        ("os:sep", "not a callable"),
        ("", "Empty module name"),
    ],
)
def test_a_check_of_prompts_is_a_function_of_two_arguments(name: str, why: str | None) -> None:
    if why is None:
        load_prompt_check(name)
        return
    with pytest.raises(EngineError, match=f"--prompt-check {name} cannot be used .*({why}).*package.module:function"):
        load_prompt_check(name)


def test_a_module_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "checks_that_fail.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match="ZeroDivisionError: division by zero"):
        load_prompt_check("checks_that_fail:f")


def test_a_coroutine_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(_prompt: str, _negative_prompt: str) -> None: ...

    module = ModuleType("asynchronous_checks")
    monkeypatch.setattr(module, "check", check, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(EngineError, match="without async"):
        load_prompt_check("asynchronous_checks:check")


def test_a_check_that_can_be_used_is_loaded() -> None:
    assert load_prompt_check("tests.support.prompt_checks:refuse_boats")._check is prompt_checks.refuse_boats
