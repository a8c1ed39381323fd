"""Bars where people watch, plain lines where a log does."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from engines.console import BuildLog, BuildProgress, progress_on


def told(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


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
