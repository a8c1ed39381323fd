"""Callers who are refused together come back one by one."""

from __future__ import annotations

import pytest

from server.api.problems import problem, problem_response
from server.api.retry_after import spread
from server.requests.errors import QueueFull

ALMOST_ONE = 1 - 2**-53


@pytest.mark.parametrize(
    ("seconds", "first", "last"), [(1, 1, 2), (2, 2, 3), (5, 5, 7), (40, 40, 60), (80, 80, 120), (120, 80, 120)]
)
def test_it_is_up_to_half_as_long_again_and_at_most_two_minutes(seconds: int, first: int, last: int) -> None:
    assert spread(seconds, dice=lambda: 0.0) == first
    assert spread(seconds, dice=lambda: ALMOST_ONE) == last


def test_every_second_between_is_as_likely() -> None:
    assert [spread(10, dice=lambda part=part: part / 6 + 0.01) for part in range(6)] == [10, 11, 12, 13, 14, 15]  # type: ignore[misc]


def test_responses_are_spread() -> None:
    error = QueueFull("64 requests are waiting: try again later.", retry_after=80)
    told = {int(problem_response(problem(error), retry_after=80).headers["Retry-After"]) for _ in range(200)}
    assert len(told) > 10
    assert min(told) >= 80
    assert max(told) <= 120
