"""What a request owns: its images are given out only if the device says that all of them are finite."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import pytest

from engines.contract import Array
from engines.manifest import NoiseSchedule, Size
from engines.schedulers import Scheduler, table
from server.requests.errors import BrokenPicture, ContentBlocked
from server.requests.params import GenerationParams, Image
from server.requests.request import Request
from server.requests.tokenizer import Prompt
from server.runtime.pipeline.admission import DecodeCall, DecodedImage, PendingDecode
from server.runtime.pipeline.safety import UNCHECKED, Mode, Safety


@dataclass
class Arrived:
    """A reading that is here."""

    array: Array

    def done(self) -> bool:
        return True

    def result(self) -> Array:
        return self.array


def pending(*flags: float, safety: Safety = UNCHECKED, scores: tuple[float, ...] = ()) -> PendingDecode:
    """`scores` are what the safety checker says of each image's one concept."""
    params = GenerationParams(
        Prompt("", ()),
        Prompt("", ()),
        Size(width=8, height=8),
        Scheduler("euler"),
        1,
        1.0,
        tuple(range(7, 7 + len(flags))),
    )
    request = Request(params, table(params.scheduler, 1, NoiseSchedule()), (), "a")
    calls = [
        DecodeCall(Arrived(np.full((1, 8, 8, 3), index, np.uint8)), Arrived(np.array([flag], np.float32)), said)
        for index, (flag, said) in enumerate(zip_longest(flags, map(_said, scores)))
    ]
    images = tuple(DecodedImage(call, 0) for call in calls)
    return PendingDecode(request, ExitStack(), decoded=images, safety=safety)


def _said(score: float) -> tuple[Arrived, Arrived]:
    return Arrived(np.array([[score]], np.float32)), Arrived(np.array([[-1]], np.float32))


def test_finite_images_are_given_out() -> None:
    assert len(pending(1, 1).images()) == 2


@pytest.mark.parametrize("flag", [0.0, float("nan"), float("inf"), 0.5])
def test_any_other_answer_of_the_device_is_a_broken_picture(flag: float) -> None:
    with pytest.raises(BrokenPicture):
        pending(1, flag).images()


def test_images_that_are_not_checked_have_no_verdicts() -> None:
    assert pending(1, 1).completed().flagged is None


def test_the_graph_gives_a_verdict_per_image() -> None:
    assert pending(1, 1, safety=Safety("flag"), scores=(-0.2, 0.2)).completed().flagged == (False, True)


def test_a_classifier_begins_when_images_have_arrived_and_is_waited_for() -> None:
    verdicts = [Future[bool](), Future[bool]()]
    seen: list[int] = []

    def classify(image: Image) -> Future[bool]:
        seen.append(int(image[0, 0, 0]))
        return verdicts[len(seen) - 1]

    decode = pending(1, 1, safety=Safety("flag", classify))
    assert not decode.done()
    assert not decode.done()
    assert seen == [0, 1], "each image once"
    verdicts[0].set_result(True)
    assert not decode.done()
    verdicts[1].set_result(False)
    assert decode.done()
    assert decode.completed().flagged == (True, False)


@pytest.mark.parametrize(("score", "mode"), [(0.2, "flag"), (-0.2, "block")])
def test_other_images_are_given_out(score: float, mode: Mode) -> None:
    assert len(pending(1, 1, safety=Safety(mode), scores=(-0.2, score)).completed().images) == 2


def test_a_flagged_image_blocks_its_request_and_its_seed_is_named() -> None:
    with pytest.raises(ContentBlocked, match="the image of seed 8: use another seed") as blocked:
        pending(1, 1, safety=Safety("block"), scores=(-0.2, 0.2)).completed()
    assert blocked.value.seeds == (8,)
