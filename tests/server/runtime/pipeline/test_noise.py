"""NoiseGenerator against torch's own CPU generator."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from server.runtime.pipeline.noise import NoiseAhead, NoiseGenerator, StepNoise

SEEDS = [0, 1, 42, 2**32 - 1, 2**32 + 5, 2**63]
SHAPE = (4, 8, 8)
SHAPES = [(1, 4, 64, 64), (1, 4, 9, 9), (4, 16, 16), (3, 5, 7), (16,), (17,), (31,), (15,), (2, 3), (1,), (), (0,)]


def check(seed: int, shapes: list[tuple[int, ...]]) -> None:
    torchs, ours = torch.Generator("cpu").manual_seed(seed), NoiseGenerator(seed)
    for shape in shapes:
        z = ours.randn(shape)
        assert z.dtype == np.float32
        assert z.shape == shape
        np.testing.assert_allclose(z, torch.randn(shape, generator=torchs).numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_torchs(seed: int, shape: tuple[int, ...]) -> None:
    check(seed, [shape])


@pytest.mark.parametrize("seed", SEEDS)
def test_successive_draws_continue_torchs_stream(seed: int) -> None:
    check(seed, [(1, 4, 8, 8)] * 3 + [(17,), (1, 4, 9, 9), (16,)])


@pytest.mark.parametrize("seed", SEEDS)
def test_small_draws_keep_their_spare_normal_over_large_ones(seed: int) -> None:
    check(seed, [(3,), (1, 4, 8, 8), (1,), (), (17,), (2, 3), (15,), (1, 4, 9, 9), (1,)])


def test_noise_is_standard_normal() -> None:
    z = NoiseGenerator(7).randn((1000, 1000))
    assert abs(z.mean()) < 5e-3
    assert abs(z.std() - 1) < 5e-3


def test_only_the_low_32_bits_of_a_seed_count() -> None:
    np.testing.assert_array_equal(NoiseGenerator(2**32 + 5).randn((64,)), NoiseGenerator(5).randn((64,)))


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed -1 is negative: choose one from 0 upwards"):
        NoiseGenerator(-1)


def test_a_generator_begins_anew_whoever_drew_before() -> None:
    """Twisters of generators that are gone are seeded again; those of the living are theirs alone."""
    first = NoiseGenerator(3).randn((4, 16, 16))
    NoiseGenerator(9).randn((17,))
    again, other = NoiseGenerator(3), NoiseGenerator(9)
    other.randn((5,))
    np.testing.assert_array_equal(again.randn((4, 16, 16)), first)


def step_noise(*seeds: int) -> StepNoise:
    return StepNoise([NoiseGenerator(seed) for seed in seeds], SHAPE)


def test_noise_that_is_drawn_ahead_is_the_same_to_the_bit() -> None:
    ahead, inline = NoiseAhead(), step_noise(1, 2)
    noise, other = step_noise(1, 2), step_noise(3)
    for _step in range(4):
        ahead.begin([other, noise])
        np.testing.assert_array_equal(noise.take(), inline.take())
    expected = NoiseGenerator(3).randn(SHAPE)
    np.testing.assert_array_equal(other.take(), [expected], err_msg="begun again and again, it is drawn once")
    ahead.close()


def test_what_goes_wrong_while_noise_is_drawn_is_raised_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, broken, sound = NoiseAhead(), step_noise(1), step_noise(2)
    error = MemoryError()

    def fail(_shape: tuple[int, ...]) -> None:
        raise error

    monkeypatch.setattr(broken._generators[0], "randn", fail)
    ahead.begin([broken, sound])
    assert sound.take().shape == (1, *SHAPE)
    for _ in range(2):
        with pytest.raises(MemoryError):
            broken.fetch()
    ahead.close()


def test_the_thread_ends_when_it_is_closed() -> None:
    ahead, noise = NoiseAhead(), step_noise(1)
    ahead.begin([noise])
    noise.fetch()
    (thread,) = [one for one in threading.enumerate() if one.name.startswith("noise")]
    ahead.close()
    thread.join(timeout=10)
    assert not thread.is_alive()
