"""Command lines: every value arrives as it was written, and an error names its flag in one line."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BeforeValidator, Field
from pydantic_settings import CliPositionalArg, CliToggleFlag, NoDecode

from engines.cli import CommandLine, Metavar, Repeatable, RepeatableList, parse, split_command


def numbers(text: object) -> object:
    if not isinstance(text, str):
        return text
    if not text.replace(",", "").isdecimal():
        raise ValueError(f"{text!r} is no list of numbers")
    return tuple(map(int, text.split(",")))


class Draw(CommandLine):
    """Draw what is asked for."""

    folder: Annotated[CliPositionalArg[Path], Metavar("FOLDER")] = Field(description="where it goes")
    model: str = Field(description="what draws")
    prompt: Repeatable[str] = Field((), description="what is drawn")
    style: Repeatable[Literal["oil", "ink"]] = Field((), description="how")
    size: Annotated[RepeatableList[str], Metavar("WxH")] = Field((), description="how large")
    rows: Annotated[tuple[int, ...] | None, NoDecode, BeforeValidator(numbers)] = Field(None, description="rows")
    batch: int | None = Field(None, ge=1, description="how many at once")
    force: CliToggleFlag[bool] = Field(False, description="anew")
    verify: bool = Field(True, description="compare")


def draw(*words: str) -> Draw:
    return parse(Draw, words, prog="draw")


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    with pytest.raises(SystemExit) as ended:
        draw(*words)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()


def test_flags_that_are_not_given_have_their_defaults() -> None:
    drawn = draw("here", "--model", "m")
    assert (drawn.folder, drawn.model) == (Path("here"), "m")
    assert (drawn.prompt, drawn.style, drawn.size, drawn.rows, drawn.batch) == ((), (), (), None, None)
    assert (drawn.force, drawn.verify) == (False, True)


@pytest.mark.parametrize("text", ["a, b", 'a "quoted" word', "[a]", "back\\slash", "None", "null", "", "{}", "5", "é"])
def test_values_are_taken_as_they_are(text: str) -> None:
    assert draw("here", "--model", "m", "--prompt", text, "--prompt", "b").prompt == (text, "b")
    assert draw("here", "--model", "m", "--prompt", text).prompt == (text,)
    assert draw("here", "--model", text or "-").model == (text or "-")


def test_a_flag_may_take_several_values_and_be_repeated() -> None:
    drawn = draw("here", "--model", "m", "--size", "1x1", "2x2", "--size", "3x3", "--rows", "2,4")
    assert drawn.size == ("1x1", "2x2", "3x3")
    assert drawn.rows == (2, 4)
    assert draw("--model", "m", "--style", "oil", "--style", "ink", "here").style == ("oil", "ink")


def test_booleans_are_flags() -> None:
    drawn = draw("here", "--model", "m", "--force", "--no-verify")
    assert (drawn.force, drawn.verify) == (True, False)


def test_environment_variables_configure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODEL", "FORCE", "ROWS", "PROMPT", "prompt"):
        monkeypatch.setenv(name, "1")
    drawn = draw("here", "--model", "m")
    assert (drawn.model, drawn.force, drawn.rows, drawn.prompt) == ("m", False, None, ())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["here"], "error: the following arguments are required: --model"),
        (["--model", "m"], "error: the following arguments are required: FOLDER"),
        (["here", "--model", "m", "--rows", "x"], "error: --rows: 'x' is no list of numbers"),
        (["here", "--model", "m", "--batch", "0"], "error: --batch: Input should be greater than or equal to 1"),
        (["here", "--model", "m", "--style", "pen"], "error: --style: Input should be 'oil' or 'ink'"),
        (["here", "--model", "m", "--prompt"], "error: argument --prompt: expected one argument"),
        (
            ["here", "--model", "m", "--promt", "a"],
            "error: there is no flag --promt: did you mean --prompt?",
        ),
        (["here", "--modle", "m"], "error: there is no flag --modle: did you mean --model?"),
        (["here", "-model", "m"], "error: there is no flag -model: did you mean --model?"),
        (["here", "--model", "m", "--zzz=1"], "error: there is no flag --zzz: --help lists them"),
    ],
)
def test_an_error_is_one_line_that_names_the_flag(
    capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    assert complaint(capsys, *words) == [line]


def test_every_wrong_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    lines = complaint(capsys, "here", "--model", "m", "--rows", "x", "--batch", "0")
    assert [line.split(":")[1].strip() for line in lines] == ["--rows", "--batch"]


def test_the_help_shows_metavars_and_no_defaults_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        draw("--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: draw ")
    assert "Draw what is asked for." in shown
    assert "--size WxH [WxH ...]" in shown
    assert "--style {oil,ink}" in shown
    assert "--batch BATCH" in shown
    assert "--verify, --no-verify" in shown
    assert "None" not in shown
    assert "\0" not in shown
    assert "()" not in shown


def test_a_command_line_without_a_command_is_the_default_one() -> None:
    commands = ("build", "compile")
    assert split_command(["compile", "here"], commands, default="build") == ("compile", ["here"])
    assert split_command(["--model", "m"], commands, default="build") == ("build", ["--model", "m"])
    assert split_command([], commands, default="build") == ("build", [])


def test_an_unknown_command_is_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        split_command(["compil", "here"], ("build", "compile"), default="build")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: there is no command 'compil': did you mean compile? (build, compile)\n"


def test_the_version_is_shown_without_what_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(Draw, ["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"latentd {version('latentd')}\n"
