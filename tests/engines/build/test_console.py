"""Bars where people watch, plain lines where a log does."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engines.build.console import BuildFeed, BuildLog, BuildProgress, progress_on


def told(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines(file: io.StringIO) -> list[Any]:
    return [json.loads(line) for line in file.getvalue().splitlines()]


def test_a_log_has_a_line_when_a_stage_begins_and_one_when_it_ends() -> None:
    console = Console(file=io.StringIO())
    with progress_on(console) as progress:
        assert isinstance(progress, BuildLog)
        with progress.stage("compiling") as stage:
            stage.update(1, 2)
            with progress.stage("a phase within"):
                pass
        progress.note("a [remark] with brackets")
    lines = told(console).splitlines()
    assert lines[0] == "compiling ..."
    assert lines[1].startswith("compiling: ")
    assert lines[2:] == ["a [remark] with brackets"]


def test_a_terminal_has_bars_and_keeps_the_outer_stages() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with progress_on(console) as progress:
        assert isinstance(progress, BuildProgress)
        with progress.stage("compiling") as stage:
            stage.update(1, 2)
            with progress.stage("a phase within") as inner:
                inner.update(3, 4)
    final = told(console).split("compiling")[-1]  # the last time it was drawn
    assert "100%" in final
    assert "within" not in final


def test_a_failed_stage_does_not_claim_to_be_done() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)

    def fail() -> None:
        with progress_on(console) as progress, progress.stage("compiling") as stage:
            stage.update(1, 2)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert "100%" not in told(console)


def test_a_program_hears_how_far_the_outermost_stage_is() -> None:
    """Stages that lie within a step are each taken for half of what is left of it, since nobody says how many come."""
    file = io.StringIO()
    with BuildFeed(file) as progress, progress.stage("compiling"):
        with progress.stage("reading"):
            pass
        with progress.stage("building") as building:
            building.update(0, 2)
            for _ in range(2):
                with progress.stage("timing") as timing:
                    timing.update(1, 2)
                    timing.update(2, 2)
                    timing.update(2, 2)
            progress.note("a warning")
            building.update(1, 2)
            building.update(2, 2)
    told = [said["percent"] for said in lines(file) if "stage" in said]
    assert {said["stage"] for said in lines(file) if "stage" in said} == {"compiling"}
    assert {"note": "a warning"} in lines(file)
    assert told == [None, 0, 12, 25, 31, 37, 50, 100]


def test_every_outer_stage_begins_anew() -> None:
    file = io.StringIO()
    progress = BuildFeed(file)
    with progress.stage("verifying") as stage:
        for step in (1, 2, 4):
            stage.update(step, 4)
    with progress.stage("next"):
        pass
    assert [(said["stage"], said["percent"]) for said in lines(file)] == [
        ("verifying", None),
        ("verifying", 25),
        ("verifying", 50),
        ("verifying", 100),
        ("next", None),
    ]


def test_a_build_for_a_program_ends_with_its_input(bundle: Path) -> None:
    """Whether it was closed or whoever held it is gone."""
    code = (
        "import build_engines, sys, time\n"
        "build_engines._compile = lambda *_: time.sleep(600)\n"
        "build_engines.COMMANDS['compile'] = (build_engines._compile_parser, build_engines._compile)\n"
        "sys.exit(build_engines.main(['compile', sys.argv[1], '--progress', 'json']))\n"
    )
    command = [sys.executable, "-c", code, str(bundle)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 - our own command
    assert done.returncode == 130
    assert "cancelled" in done.stderr
