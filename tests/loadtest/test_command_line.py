"""The command's options and its errors before anything is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.cli import parse
from loadtest import __main__ as command
from loadtest.command_line import LoadTestOptions
from tests.loadtest.records import UNREACHABLE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a load"),
        (["--rate", "0"], "--rate: Input should be greater than 0"),
        (["--rate", "1", "--rate", "nan"], "--rate: Input should be a finite number"),
        (["--rate", "2,4"], "--rate: Input should be a valid number"),
        (["--users", "1.5"], "--users: Input should be a valid integer"),
        (["--rate", "1", "--warm-up", "-1"], "--warm-up: Input should be greater than or equal to 0"),
        (["--rate", "1", "--factor", "1"], "--factor: Input should be greater than 1.05"),
        (["--rate", "1", "--format", "gif"], "--format: Input should be 'json', 'png', 'events' or 'openai'"),
        (["--rate", "1", "--mix", "x", "--steps", "3"], "--mix gives all fields of a request itself"),
        (["--sweep", "--baseline", "x"], "--baseline compares equal loads"),
    ],
)
def test_invalid_options_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--out", "nowhere", *words])
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: --out"),
        (["--out", "x", "--rate"], "expected one argument"),
        (["--fast"], "did you mean --format?"),
    ],
)
def test_incomplete_commands_exit_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(words)
    assert message in capsys.readouterr().err


def test_options_may_be_repeated_and_prompts_are_taken_as_they_are() -> None:
    prompts = ["a red heart, on yellow", '[a "cat" \\', "5", "null"]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    options = parse(LoadTestOptions, ["--out", "x", "--rate", "2", "--rate=4", "--rate", "2", "--users", "8", *words])
    assert options.rate == (2.0, 4.0)
    assert options.users == (8,)
    assert list(options.prompt) == prompts


def test_environment_variables_are_not_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEED", "seed", "URL", "url"):
        monkeypatch.setenv(name, "7")
    options = parse(LoadTestOptions, ["--out", "x", "--sweep"])
    assert (options.seed, options.url, options.sweep) == (0, "http://127.0.0.1:8000", True)


def test_help_has_the_documented_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    shown = capsys.readouterr().out
    assert "usage: python -m loadtest" in shown
    for option in ("--rate", "--users", "--sweep", "--mix", "--baseline", "--warm-up", "--slo", "--format"):
        assert option in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--url", UNREACHABLE], "No server answers at http://127.0.0.1:9"),
        (["--url", "nonsense"], "No server answers at nonsense"),
        (["--url", UNREACHABLE, "--baseline", "nowhere"], "nowhere has no run to compare with"),
    ],
)
def test_unmeasurable_servers_are_reported(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--rate", "1", "--out", str(tmp_path), *words]) == 2
    assert message in " ".join(capsys.readouterr().out.split())
