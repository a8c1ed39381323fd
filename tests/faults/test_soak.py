"""Callers who come and go: what a server holds stays as it was."""

from __future__ import annotations

from benchmarks.server.soak import soak

_REQUESTS, _CALLERS = 600, 32  # a fifth of what the command sends


def test_a_soak_leaves_memory_descriptors_threads_and_pictures_as_they_were() -> None:
    found = soak(_REQUESTS, _CALLERS)
    assert not found.faults
    assert found.answers.keys() <= {"completed", "left"}
    assert found.answers["left"] > _REQUESTS / 20, "nobody left: this proves nothing"
    assert found.outcomes["cancelled"] > _REQUESTS / 40
    assert [sample.in_flight for sample in found.samples] == [0] * len(found.samples)
