"""What is known of how long steps take."""

from __future__ import annotations

from typing import Any

import pytest

from engines.manifest import NoiseSchedule, Size
from engines.schedulers import Scheduler, table
from server.requests.params import GenerationParams
from server.requests.request import Request
from server.requests.tokenizer import Prompt
from server.runtime.batching.step_times import Kind, StepTimeModel

SIZE = Size(width=64, height=64)
KIND: Kind = (SIZE, "full")
OTHER: Kind = (Size(width=128, height=64), "full")
SHALLOW: Kind = (SIZE, "shallow")


def step_times(**seconds: float) -> StepTimeModel:
    """Measured at rows r2, r8 …"""
    made = StepTimeModel(max_rows=16)
    for rows, value in seconds.items():
        made.observe(KIND, int(rows[1:]), value)
    return made


def request(*, images: int, steps: int, done: int = 0, size: Size = SIZE, **fields: Any) -> Request:
    nothing = Prompt("", ())
    params = GenerationParams(nothing, nothing, size, Scheduler("ddim"), steps, 7.5, tuple(range(images)), **fields)
    made = Request(params, table(params.scheduler, steps, NoiseSchedule()), (), "a")
    for _ in range(done):
        made.advance()
    return made


@pytest.mark.parametrize(("rows", "seconds"), [(2, 1.0), (4, 2.0), (8, 4.0), (1, 1.0), (16, 8.0)])
def test_between_measured_rows_it_is_a_line_and_beyond_them_in_proportion(rows: int, seconds: float) -> None:
    assert step_times(r2=1, r8=4).seconds(KIND, rows) == pytest.approx(seconds)


def test_of_a_size_that_was_not_measured_nothing_is_known() -> None:
    assert step_times(r2=1).seconds(OTHER, 2) == 0


def test_it_follows_what_changes_slowly() -> None:
    made = step_times(r2=1)
    made.observe(KIND, 2, 2)
    assert made.seconds(KIND, 2) == pytest.approx(1.1)
    for _ in range(100):
        made.observe(KIND, 2, 2)
    assert made.seconds(KIND, 2) == pytest.approx(2, rel=1e-3)


def test_a_larger_bucket_is_taken_where_it_is_the_faster() -> None:
    assert step_times(r2=1, r4=3, r8=2).cheapest(KIND, [4, 8]) == 8
    assert step_times(r2=1, r4=2, r8=3).cheapest(KIND, [4, 8]) == 4


def test_the_work_of_a_request_is_its_share_of_full_steps() -> None:
    made = step_times(r16=8)
    assert made.work(request(images=2, steps=10)) == pytest.approx(8 * 4 / 16 * 10)
    assert made.work(request(images=2, steps=10, done=7)) == pytest.approx(8 * 4 / 16 * 3)


def test_the_ends_are_kept_by_size_and_decoder() -> None:
    made = step_times()
    made.observe_encode_decode(SIZE, 2.5)
    made.observe_encode_decode(SIZE, 0.5, decoder="fast")
    assert (made.encode_decode(SIZE), made.encode_decode(OTHER[0])) == (2.5, 0)
    assert (made.encode_decode(SIZE, "fast"), made.encode_decode(OTHER[0], "fast")) == (0.5, 0)
    assert made.curves() == {}


def test_shallow_steps_are_less_work() -> None:
    made = step_times(r16=8)
    made.observe(SHALLOW, 16, 1)
    cached = request(images=2, steps=10, done=1, cache="fast")  # four full ones are left
    assert made.work(cached) == pytest.approx((4 * 8 + 5 * 1) * 4 / 16)


def test_where_steps_are_padded_they_take_as_long_as_the_best_that_was_measured() -> None:
    times = step_times(r2=1, r4=3, r8=2)
    times.pads = True
    assert [times.seconds(KIND, rows) for rows in (1, 2, 3, 8, 16)] == [1, 1, 2, 2, 4]


def test_a_request_takes_its_steps_and_what_is_encoded_and_decoded_for_it_alone() -> None:
    times = step_times(r2=1, r16=8)
    times.observe_encode_decode(SIZE, 3.0, init_image=1.0)
    assert times.alone(request(images=1, steps=5)) == pytest.approx(5 * 1 + 2)
    assert times.alone(request(images=1, steps=5, size=OTHER[0])) == 0, "nothing is known of that size"
    assert times.encode_decode(SIZE) == 3
    times.observe_encode_decode(SIZE, 1.5, init_image=1.0, decoder="fast")
    assert times.alone(request(images=1, steps=5, decoder="fast")) == pytest.approx(5 * 1 + 0.5)
