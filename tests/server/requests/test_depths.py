"""How many steps are full."""

from __future__ import annotations

import pytest

from engines.manifest import NoiseSchedule
from engines.schedulers import METHODS, find, table
from server.requests.depths import Cache, full_count


def counted(name: str, steps: int, cache: Cache = "fast") -> tuple[int, int]:
    """Full calls, and calls."""
    scheduler = find(name)
    calls = table(scheduler, steps, NoiseSchedule())
    return full_count(cache, calls, METHODS[scheduler.method]), len(calls.steps)


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [
        ("dpmpp_2m", 20, (6, 20)),
        ("dpmpp_2m", 10, (5, 10)),
        ("dpmpp_2m", 5, (4, 5)),
        # With the half of their calls that is five steps, heun and kdpm2 lost what the prompt names.
        ("heun", 10, (10, 19)),
        ("kdpm2", 10, (11, 19)),
        ("kdpm2_ancestral", 10, (10, 19)),
        ("heun", 5, (8, 9)),
        ("heun", 20, (11, 39)),
    ],
)
def test_at_least_half_of_ten_steps_and_four(name: str, steps: int, expected: tuple[int, int]) -> None:
    assert counted(name, steps) == expected


def test_large_steps_have_more_full_ones() -> None:
    """Of ten, five lost what the prompt names in one image in three of dpmpp_2m_karras."""
    assert [counted("dpmpp_2m_karras", steps)[0] for steps in (10, 12, 15, 20)] == [8, 7, 6, 6]
    assert [counted("dpmpp_2m_karras", steps, "faster")[0] for steps in (20, 25, 50)] == [6, 8, 11]
    assert counted("dpmpp_2m", 7) == (5, 7)
    assert counted("ddim", 1)[1] == 1
    # Two or three calls of these are one step of the solver.
    assert [counted(name, 10)[0] for name in ("dpmpp_2s", "dpmpp_3s")] == [8, 8]
    assert [counted(name, 20, "faster")[0] for name in ("dpmpp_2s", "dpmpp_3s")] == [5, 8]


@pytest.mark.parametrize("name", ["dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde", "unipc", "heun"])
@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_each_position_computes_no_more_than_the_one_before(name: str, steps: int) -> None:
    (off, calls), (fast, _), (faster, _) = (counted(name, steps, cache) for cache in ("off", "fast", "faster"))
    assert off == calls >= min(fast, calls) >= min(faster, calls)
