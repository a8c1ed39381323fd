"""The display of progress: bars on a terminal, plain lines in a log, JSON for a program."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engines.build import tables
from engines.build.api import BackendPlan
from engines.build.console import BarDisplay, JsonDisplay, LogDisplay, display_on
from engines.build.tables import inspect_tables, plan_table, serve_command, summary_table
from engines.contract import GRAPHS
from engines.manifest import Manifest
from tests import ROOT


def written_to(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines(file: io.StringIO) -> list[Any]:
    return [json.loads(line) for line in file.getvalue().splitlines()]


def test_a_log_has_a_line_when_a_stage_begins_and_one_when_it_ends() -> None:
    console = Console(file=io.StringIO())
    with display_on(console) as progress:
        assert isinstance(progress, LogDisplay)
        with progress.stage("compiling") as stage:
            stage.update(1, 2)
            with progress.stage("a phase within"):
                pass
        progress.note("a [remark] with brackets")
    written = written_to(console).splitlines()
    assert written[0] == "compiling ..."
    assert written[1].startswith("compiling: ")
    assert written[2:] == ["a [remark] with brackets"]


def test_a_log_numbers_the_stages_that_were_announced() -> None:
    console = Console(file=io.StringIO())
    with display_on(console) as progress:
        progress.expect(["reading", "exporting"])
        with progress.stage("exporting"):
            pass
    assert written_to(console).startswith("[1/1] exporting ...")


def test_a_terminal_has_bars_and_a_line_for_each_outer_stage_that_ended() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with display_on(console) as progress:
        assert isinstance(progress, BarDisplay)
        with progress.stage("compiling [a]") as stage:
            stage.update(1, 2)
            with progress.stage("a phase within") as inner:
                inner.update(3, 4)
        console.print("the summary")
    assert "within" in written_to(console)
    assert re.sub(r"\d+\.\d s", "1.0 s", "\n".join(screen(console))) == "✓ compiling [a] 1.0 s\nthe summary"


def test_a_failed_stage_does_not_claim_to_be_done() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)

    def fail() -> None:
        with display_on(console) as progress, progress.stage("compiling") as stage:
            stage.update(1, 2)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert "100%" not in written_to(console)
    assert "✓" not in written_to(console)
    assert "✗" in written_to(console)


def test_a_terminal_shows_how_far_the_whole_build_is() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    times = iter(range(1000))
    with BarDisplay(console, clock=lambda: float(next(times))) as progress:
        progress.expect(["a", "b", "c", "d"])
        for name in ("a", "b"):
            with progress.stage(name):
                pass
        with progress.stage("c") as stage:
            stage.update(1, 2)
    assert "in all, about" in written_to(console)
    assert "s left" in written_to(console)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_names_of_graphs_are_never_cut(manifest: Manifest, width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    plan = BackendPlan("tensorrt_rtx", manifest, dict.fromkeys(GRAPHS, "fp16"), manifest.parameters)
    for table in (plan_table(plan), summary_table(manifest, "onnxruntime"), inspect_tables(manifest)):
        console.print(table)
    written = written_to(console)
    assert "…" not in written
    assert all(written.count(f" {name} ") >= 3 for name in GRAPHS)
    assert max(map(len, written.splitlines())) <= width


def test_columns_of_which_nothing_is_known_are_left_out(manifest: Manifest) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(summary_table(manifest, "onnxruntime"))
    assert "built in" not in written_to(console)
    assert "largest error" in written_to(console)


def screen(console: Console) -> list[str]:
    """The lines that a terminal shows after what was written to it; of control sequences, those that bars use."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written_to(console)):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[1A":
            row -= 1
        elif part in {"\x1b[2K", "\r"}:
            lines[row] = "" if part != "\r" else lines[row]
        elif not part.startswith("\x1b"):
            lines[row] += part
    return [line for line in lines if line]


def test_json_lines_hold_the_percentage_of_the_outermost_stage() -> None:
    """Each stage that is nested in a step counts for half of what is left of it, since their number is unknown."""
    file = io.StringIO()
    with JsonDisplay(file) as progress, progress.stage("compiling"):
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
    percentages = [line["percent"] for line in lines(file) if "stage" in line]
    assert {line["stage"] for line in lines(file) if "stage" in line} == {"compiling"}
    assert {"note": "a warning"} in lines(file)
    assert percentages == [None, 0, 12, 25, 31, 37, 50, 100]


def test_every_outer_stage_begins_anew() -> None:
    file = io.StringIO()
    progress = JsonDisplay(file)
    with progress.stage("verifying") as stage:
        for step in (1, 2, 4):
            stage.update(step, 4)
    with progress.stage("next"):
        pass
    assert [(line["stage"], line["percent"]) for line in lines(file)] == [
        ("verifying", None),
        ("verifying", 25),
        ("verifying", 50),
        ("verifying", 100),
        ("next", None),
    ]


def test_a_build_for_a_program_is_cancelled_when_its_standard_input_closes(bundle: Path) -> None:
    """Whether the other program closed it or has ended."""
    code = (
        "import build_engines, sys, time\n"
        "build_engines.CompileCommand.run = lambda *_: time.sleep(600)\n"
        "sys.exit(build_engines.main(['compile', sys.argv[1], '--progress', 'json']))\n"
    )
    command = [sys.executable, "-c", code, str(bundle)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 - our own command
    assert done.returncode == 130
    assert "cancelled" in done.stderr


def test_the_command_that_serves_is_one_that_works_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert serve_command(Path("my own")) == "scripts/serve --bundle 'my own'"
    assert (ROOT / "scripts" / "serve").exists()
    monkeypatch.chdir(tmp_path)
    assert serve_command(Path("b")) == f"{ROOT}/scripts/serve --bundle b"
    monkeypatch.setattr(tables, "_ROOT", tmp_path)  # as in an installed package
    assert serve_command(Path("b")) == "latentd --bundle b"
