"""Types of options that the commands of benchmarks share."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from benchmarks.cli import ImageSize, Seconds, size_of
from engines.manifest import Size


def test_a_size_is_width_and_height() -> None:
    assert size_of(TypeAdapter(ImageSize).validate_python("64x32")) == Size(width=64, height=32)


@pytest.mark.parametrize("text", ["512", "0x64", "64x", "axb", "64x64x3"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(ImageSize).validate_python(text)


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "soon"])
def test_seconds_are_a_finite_number_above_0(text: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Seconds).validate_python(text)
