"""Messages between the building process and its parent."""

from __future__ import annotations

import pytest

from engines.build.trt.messages import (
    BuildFailure,
    BuildWarning,
    EngineReport,
    MemoryUsed,
    Message,
    PhaseAdvanced,
    PhaseFinished,
    PhaseStarted,
    decode,
    encode,
)

MESSAGES: list[Message] = [
    PhaseStarted("Building engine", 12),
    PhaseAdvanced("Building engine", 3),
    PhaseFinished("Building engine"),
    MemoryUsed(2**30),
    BuildWarning("a line\nand another"),
    BuildFailure("OutOfMemory", "full"),
    EngineReport(layers=None, seconds=1.5, memory=7, activations=[1, 2]),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda one: type(one).__name__)
def test_a_message_is_one_line_and_decodes_to_the_same(message: Message) -> None:
    line = encode(message)
    assert line.count("\n") == 1
    assert line.endswith("\n")
    assert decode(line) == message
