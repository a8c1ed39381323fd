"""What the commands of benchmarks share: types of their options, errors, and the console for tables."""

from __future__ import annotations

import sys
from typing import Annotated

from pydantic import Field
from rich.console import Console
from rich.markup import escape

from engines.manifest import Size

ImageSize = Annotated[str, Field(pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}$")]  # WIDTHxHEIGHT
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def size_of(text: str) -> Size:
    """The width and height of an `ImageSize`."""
    width, height = map(int, text.split("x"))
    return Size(width=width, height=height)


def complain(error: Exception | str) -> None:
    """Print an error that ends the command, on standard error."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def table_console(width: int) -> Console:
    """Standard output; `width` columns where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=width)
