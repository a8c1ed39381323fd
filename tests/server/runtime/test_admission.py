"""What a request owns: its images are given out only if the device says that all of them are finite."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest

from engines.contract import Array
from engines.manifest import NoiseSchedule, Size
from engines.schedulers import Scheduler, table
from server.requests.errors import BrokenPicture
from server.requests.request import GenerationParams, Request
from server.requests.tokenizer import Prompt
from server.runtime.admission import DecodedImages, PendingDecode


@dataclass
class Arrived:
    """A reading that is here."""

    array: Array

    def done(self) -> bool:
        return True

    def result(self) -> Array:
        return self.array


def pending(*flags: float) -> PendingDecode:
    params = GenerationParams(
        Prompt("", ()), Prompt("", ()), Size(width=8, height=8), Scheduler("euler"), 1, 1.0, (0,) * len(flags)
    )
    request = Request(params, table(params.scheduler, 1, NoiseSchedule()), (), "a")
    chunks = [
        DecodedImages(Arrived(np.zeros((1, 8, 8, 3), np.uint8)), Arrived(np.array([flag], np.float32)))
        for flag in flags
    ]
    return PendingDecode(request, ExitStack(), decoded=chunks)


def test_finite_images_are_given_out() -> None:
    assert len(pending(1, 1).images()) == 2


@pytest.mark.parametrize("flag", [0.0, float("nan"), float("inf"), 0.5])
def test_any_other_answer_of_the_device_is_a_broken_picture(flag: float) -> None:
    with pytest.raises(BrokenPicture):
        pending(1, flag).images()
