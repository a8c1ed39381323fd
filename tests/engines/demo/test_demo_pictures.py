"""The demo model's training images, captions and checker, and the scores of `engines/demo/check.py`."""

import random

import numpy as np
import pytest
from PIL import Image

from engines.demo.check import judge, report, score
from engines.demo.pictures import (
    NOTHING,
    SIZE,
    GlyphPlacement,
    Seen,
    caption,
    check,
    compose,
    concepts,
    draw_prompts,
    placements,
    random_caption,
)

THINGS = concepts().things
COLORS = list(concepts().colors)


def test_there_are_102_things_and_10_colors() -> None:
    assert len(set(THINGS)) == len(THINGS) == 102
    assert len(COLORS) == 10
    assert {"red heart", "red apple"} < set(THINGS)


@pytest.mark.parametrize("number", range(len(THINGS)))
def test_the_checker_names_every_thing_wherever_it_is_composed(number: int) -> None:
    rng = random.Random(number)
    wanted = Seen(THINGS[number], rng.choice(COLORS))
    assert check(compose(*wanted, rng.choice(placements()))) == wanted


@pytest.mark.parametrize("color", COLORS)
def test_the_checker_names_every_background(color: str) -> None:
    assert check(compose("star", color)).color == color


@pytest.mark.parametrize("size", [32, 64, 128, 512])
def test_the_checker_takes_images_of_any_size(size: int) -> None:
    assert check(compose("rocket", "blue").resize((size, size))) == ("rocket", "blue")


def test_the_checker_accepts_a_blurred_and_noisy_image() -> None:
    picture = compose("panda", "green", GlyphPlacement(46, 1, -1)).resize((24, 24)).resize((SIZE, SIZE))
    noise = np.random.default_rng(0).normal(0, 12, (SIZE, SIZE, 3))
    noisy = (np.asarray(picture) + noise).clip(0, 255).astype(np.uint8)
    assert check(Image.fromarray(noisy)) == ("panda", "green")


def test_the_checker_rejects_a_wrong_image() -> None:
    seen = check(compose("cat", "pink"))
    assert seen.thing != "dog"
    assert seen.color != "red"


def test_blank_images_and_noise_show_nothing() -> None:
    assert check(Image.new("RGB", (SIZE, SIZE), concepts().colors["red"])) == (NOTHING, "red")
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    assert check(Image.fromarray(noise)).thing == NOTHING


def test_captions_use_the_right_article() -> None:
    assert caption("red apple", "blue") == "a red apple on a blue background"
    assert caption("owl", "orange") == "an owl on an orange background"
    assert caption("unicorn", "gray") == "a unicorn on a gray background"


def test_captions_vary_and_always_name_their_thing() -> None:
    rng = random.Random(0)
    drawn = {random_caption("red apple", "blue", rng) for _ in range(200)}
    assert len(drawn) > 20
    assert all("apple" in text for text in drawn)


def test_the_same_seed_draws_the_same_prompts() -> None:
    assert draw_prompts(200, 0) == draw_prompts(200, 0)
    assert draw_prompts(20, 0) != draw_prompts(20, 1)
    assert draw_prompts(2, 0) == draw_prompts(200, 0)[:2]
    assert all(prompt == caption(*wanted) for prompt, wanted in draw_prompts(20, 3))


def test_the_score_counts_things_and_backgrounds_apart() -> None:
    picture = compose("cat", "pink")
    drawn = [judge("", Seen("cat", "pink"), picture), judge("", Seen("dog", "pink"), picture)]
    result = score(drawn)
    assert (result.pictures, result.things, result.backgrounds) == (2, 1, 2)
    assert not result.passed


def test_the_report_names_what_is_wrong(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        report([judge("a dog on a pink background", Seen("dog", "pink"), compose("cat", "pink"))])
    assert "'a dog on a pink background' shows cat, pink" in caplog.text
