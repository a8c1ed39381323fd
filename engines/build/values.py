"""The values of the build's flags: how each is read from the command line, and its bounds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode

from engines.backends.registry import BACKENDS, SPECS
from engines.build.api import AUTO, OWN, PRESETS
from engines.cli import Metavar, suggestion
from engines.errors import EngineError
from engines.limits import LONGEST_NAME, MAX_GUIDANCE, MAX_ROWS, MAX_SIDE, MAX_STEPS, MIN_SIDE, PROMPT_LENGTH
from engines.manifest import Size
from engines.schedulers import find

_T = TypeVar("_T")


def parsed_by(read: Callable[[str], _T]) -> BeforeValidator:
    """Read a value from the command line; the default, and values from Python, are taken as they are."""

    def validate(value: object) -> object:
        try:
            return read(value) if isinstance(value, str) else value
        except EngineError as error:
            raise ValueError(str(error)) from None

    return BeforeValidator(validate)


def _size(text: str) -> Size:
    if not (match := re.fullmatch(r"(\d{1,9})x(\d{1,9})", text)):
        raise ValueError(f"{text!r} is not a size: write WIDTHxHEIGHT, such as 512x512")
    width, height = int(match[1]), int(match[2])
    if not MIN_SIDE <= min(width, height) <= max(width, height) <= MAX_SIDE:
        raise ValueError(f"{text!r} is not a size that can be served: sides have {MIN_SIDE} to {MAX_SIDE} pixels")
    return Size(width=width, height=height)


def _rows(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", text) or max(map(int, text.split(","))) > MAX_ROWS:
        raise ValueError(f"{text!r} is not a list of row counts from 1 to {MAX_ROWS}: write 2,4,8,16")
    return tuple(sorted({int(part) for part in text.split(",")}))


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d?", text):
        raise ValueError(f"{text!r} is not a count: write 1 to 99")
    return int(text)


def _variant(text: str) -> str:
    if not re.fullmatch(r"\w{1,32}", text):
        raise ValueError(f"{text!r} is not a variant: write the part of the files' names, such as fp16 or non_ema")
    return text


def _name(text: str) -> str:
    if not (text.strip() and len(text) <= LONGEST_NAME and text.isprintable()):
        raise ValueError(f"a name has 1 to {LONGEST_NAME} printable characters")
    return text


def _example(text: str) -> str:
    if not 0 < len(text) <= PROMPT_LENGTH:
        raise ValueError(f"a prompt has 1 to {PROMPT_LENGTH} characters")
    return text


def _backend(text: str) -> str:
    if text not in SPECS:
        raise ValueError(f"there is no backend {text!r}{suggestion(text, BACKENDS)} ({', '.join(SPECS)})")
    return text


def _backend_or_auto(text: str) -> str:
    return text if text == AUTO else _backend(text)


def _preset(text: str) -> str:
    if text not in (OWN, *PRESETS):
        raise ValueError(
            f"there is no preset {text!r}{suggestion(text, tuple(PRESETS))} ({', '.join((OWN, *PRESETS))})"
        )
    return text


def _scheduler(text: str) -> str:
    return find(text).name


RowBuckets = Annotated[tuple[int, ...], NoDecode, parsed_by(_rows), Metavar("N,N")]
Count = Annotated[int, parsed_by(_count), Metavar("N")]
Backend = Annotated[str, AfterValidator(_backend)]
BackendOrAuto = Annotated[str, AfterValidator(_backend_or_auto)]
ONE_OF_BACKENDS = Metavar("{" + ",".join(BACKENDS) + "}")
AUTO_OR_BACKEND = Metavar("{" + ",".join((AUTO, *BACKENDS)) + "}")
PresetName = Annotated[str, AfterValidator(_preset)]
ONE_OF_PRESETS = Metavar("{" + ",".join((OWN, *PRESETS)) + "}")
SchedulerName = Annotated[str, AfterValidator(_scheduler)]
Eta = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Resolution = Annotated[Size, parsed_by(_size)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
OptimizationLevel = Annotated[int, Field(ge=0, le=5)]
LoraCount = Annotated[int, Field(le=1024)]
Guidance = Annotated[float, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)]
Name = Annotated[str, AfterValidator(_name)]
Prompt = Annotated[str, AfterValidator(_example)]
Variant = Annotated[str, AfterValidator(_variant)]
