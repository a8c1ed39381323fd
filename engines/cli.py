"""Command lines as pydantic-settings models: one idiom for every command of this project.

A command is a model whose fields are its flags, and `parse` fills it in:

    class Compile(CommandLine):
        \"\"\"Compile the ONNX graphs of a bundle.\"\"\"

        bundle: Annotated[CliPositionalArg[Path], Metavar("BUNDLE")] = Field(description="folder of the bundle")
        backend: Repeatable[str] = Field((), description="what runs the engines, repeatable")

    arguments = parse(Compile, sys.argv[1:], prog="build_engines.py compile")
"""

from __future__ import annotations

import json
import re
import sys
from argparse import Action
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BeforeValidator, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

USAGE_ERROR = 2  # exit code
_NONE = "\0"  # the word for None, which no command line can hold: "None" is a name like any other
_NO_DEFAULT = re.compile(rf" ?\(default: (None|{_NONE}|\(\))\)$")  # in the help of a flag that has none
_ONE_DEFAULT = re.compile(r"\(default: \('([^']*)',\)\)$")  # of a repeatable flag, which holds a tuple
_CHOICES = re.compile(r"\{.*\}")  # within the type that pydantic-settings shows for a value
_T = TypeVar("_T")
_Command = TypeVar("_Command", bound=BaseSettings)


class CommandLine(BaseSettings):
    """Arguments of one command, read from the command line alone: environment variables do not count."""

    model_config = SettingsConfigDict(
        cli_avoid_json=True,
        cli_enforce_required=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        cli_kebab_case=True,
        cli_parse_none_str=_NONE,
        frozen=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic-settings' signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


@dataclass(frozen=True, slots=True)
class Metavar:
    """What stands for a flag's value in the help. Without one: the choices, or the flag's own name in capitals."""

    text: str


@dataclass(frozen=True, slots=True)
class _Nargs:
    """A flag that may be given several times, each time with one value or with one or more."""

    several: bool


def _items(value: Any) -> Any:
    """The values of a repeatable flag: pydantic-settings joins their JSON with commas."""
    return json.loads(f"[{value}]") if isinstance(value, str) else value


def _setting_items(value: Any) -> Any:
    """As `_items`, whose first sign is a quotation mark; in an environment variable commas separate the values."""
    if isinstance(value, str) and not value.startswith('"'):
        return [part.strip() for part in value.split(",") if part.strip()]
    return _items(value)


# Fields hold a tuple of all values. Each value is taken as it is: commas, quotes and brackets have no meaning.
Repeatable = Annotated[tuple[_T, ...], _Nargs(several=False), NoDecode, BeforeValidator(_items)]
RepeatableSetting = Annotated[tuple[_T, ...], _Nargs(several=False), NoDecode, BeforeValidator(_setting_items)]
RepeatableList = Annotated[tuple[_T, ...], _Nargs(several=True), NoDecode, BeforeValidator(_items)]


def parse(command: type[_Command], words: Sequence[str], *, prog: str | None = None) -> _Command:
    """Fill in `command` from the words of a command line; the flags of a `CommandLine`, or of any other settings.

    Args:
        command: the settings to fill in.
        words: the arguments, without the program's name.
        prog: the program's name in the help; the model's `cli_prog_name` unless given.

    Raises:
        SystemExit: with code 2 after one line on standard error for each error, which names the flag; with code 0
            after `--help` and `--version`.
    """
    flags: list[str] = []
    source = CliSettingsSource[Any](
        command, cli_prog_name=prog, cli_exit_on_error=False, add_argument_method=_argument_adder(command, flags)
    )
    try:
        return CliApp.run(command, list(words), cli_settings_source=source)
    except ValidationError as error:
        usage_error(*(_explained(command, item) for item in error.errors()))
    except SettingsError as error:
        usage_error(_with_suggestion(str(error).removeprefix("error parsing CLI: "), words, flags))


def split_command(words: Sequence[str], commands: Sequence[str], *, default: str) -> tuple[str, list[str]]:
    """The command that a command line begins with, and the words after it; `default` where it begins with a flag.

    Raises:
        SystemExit: with code 2 where the first word is no command.
    """
    first, rest = (words[0], list(words[1:])) if words else ("-", [])
    if first in commands:
        return first, rest
    if not first.startswith("-"):
        usage_error(f"there is no command {first!r}{suggestion(first, commands)} ({', '.join(commands)})")
    return default, list(words)


def usage_error(*messages: str) -> NoReturn:
    """Write each message in a line of its own on standard error, and exit with code 2."""
    sys.stderr.writelines(f"error: {message}\n" for message in messages)
    raise SystemExit(USAGE_ERROR)


def _argument_adder(command: type[BaseSettings], flags: list[str]) -> Any:
    """argparse's `add_argument` for pydantic-settings to call, with what the fields of `command` are annotated with.

    The names of all flags are added to `flags`.
    """

    def add_argument(parser: Any, *names: str, **options: Any) -> Any:
        flags.extend(name for name in names if name.startswith("--"))
        field = command.model_fields.get(names[-1].lstrip("-").replace("-", "_"))
        if field is not None:
            options |= _options(names[-1], field.metadata, options)
            if options.get("action") == "append" and not any(isinstance(item, _Nargs) for item in field.metadata):
                del options["action"]  # a list in one value, such as 2,4,8
        added = parser.add_argument(*names, **options)
        if "--help" in names:
            flags.append("--version")
            parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
        return added

    return add_argument


class _ShowVersion(Action):
    """The version of this project; looked up only when asked for, which takes longer than all the rest of parsing."""

    def __call__(self, parser: Any, *_: Any) -> None:
        sys.stdout.write(f"latentd {version('latentd')}\n")
        parser.exit()


def _options(name: str, metadata: Sequence[object], options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options of argparse that differ from those that pydantic-settings chose."""
    yield "help", _ONE_DEFAULT.sub(r"(default: \1)", _NO_DEFAULT.sub("", options["help"]))
    if "metavar" in options:
        choices = _CHOICES.search(options["metavar"])
        yield "metavar", choices[0] if choices else name.lstrip("-").upper()
    for item in metadata:
        if isinstance(item, Metavar):
            yield "metavar", item.text
        if isinstance(item, _Nargs):
            yield "type", json.dumps
            if item.several:
                yield from (("nargs", "+"), ("action", "extend"))


def _explained(command: type[BaseSettings], error: ErrorDetails) -> str:
    name = str(error["loc"][0]) if error["loc"] else ""
    message = error["msg"].removeprefix("Value error, ")
    return f"{_flag(command, name)}: {message}" if name else message


def _flag(command: type[BaseSettings], name: str) -> str:
    return "--" + name.replace("_", "-") if name in command.model_fields else name


def _with_suggestion(message: str, words: Sequence[str], flags: Sequence[str]) -> str:
    """`message`, or what is wrong with the flags among `words` that do not exist, with those they may stand for."""
    given = [word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)]
    unknown = next((word for word in given if word not in {*flags, "-h", "--help"}), None)
    if unknown is None or not re.search("unrecognized|are required", message):
        return message
    meant = suggestion("--" + unknown.lstrip("-"), flags)
    return f"there is no flag {unknown}{meant or ': --help lists them'}"


def suggestion(word: str, known: Sequence[str]) -> str:
    """`: did you mean …?` with the one of `known` that `word` was meant for; empty where none is like it."""
    close = get_close_matches(word, known, n=1)
    return f": did you mean {close[0]}?" if close else ""
