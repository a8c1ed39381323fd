"""How finished images leave a GPU, which is the host (`tests/engines/backends/fake_cuda`): together, and in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from engines.backends.cuda import CudaStream
from engines.backends.host import HostStream
from engines.errors import EngineError
from server.requests.request import Completed, Request, Stepped
from server.runtime.pipeline.admission import Admission, PendingDecode, Placement, Upload
from server.runtime.pipeline.streams import DecodePriority
from tests.support.executing import Asked, Running
from tests.support.machines import FakeMachine, Machine

TOGETHER = {"num_inference_steps": 3, "guidance_scale": 1, "scheduler": "ddim"}


def ask_together(running: Running, wishes: Sequence[dict[str, Any]]) -> tuple[list[Asked], list[Request]]:
    """Submit all of them before the first step."""
    asked = [Asked() for _ in wishes]
    requests = [running.request(one, **fields) for one, fields in zip(asked, wishes, strict=True)]
    pytest.MonkeyPatch().setattr(running.pipeline, "admit", partial(_encode_at_once, running.pipeline.admit))
    with running.batcher._changed:
        for request in requests:
            running.batcher.submit(request)
    return asked, requests


def _encode_at_once(admit: Callable[[Request], Upload | Admission], request: Request) -> Admission:
    """Otherwise one may be encoded a step later than the others, and finish after them."""
    admission = admit(request)
    assert isinstance(admission, Admission)
    admission.encoded.wait()
    return admission


def entries(running: Running) -> list[list[int]]:
    """The free entries of each staging pool."""
    return [sorted(pool._entries) for pool in running.pipeline._latent_pools.values()]


@pytest.mark.parametrize(
    ("decode_priority", "expected"), [("equal", (-5, -5, -5)), ("low", (0, -5, 0)), ("between", (-5, -5, -5))]
)
def test_decodes_have_the_priority_that_is_chosen(
    gpu: FakeMachine, decode_priority: DecodePriority, expected: tuple[int, ...]
) -> None:
    with gpu.running(decode_priority=decode_priority) as running:
        streams = running.pipeline._streams
        handles = [one.handle for one in (streams.encode, streams.steps, streams.decode) if isinstance(one, CudaStream)]
        assert tuple(map(gpu.cuda.priority_of, handles)) == expected
        assert (streams.decode is streams.steps) == (decode_priority == "between")


def test_on_a_cpu_only_the_threads_of_steps_are_urgent(cpu: Machine) -> None:
    with cpu.running() as running:
        streams = running.pipeline._streams
        urgent = [one.urgent for one in (streams.encode, streams.steps, streams.decode) if isinstance(one, HostStream)]
    assert urgent == [False, True, False]


def test_those_who_finish_in_the_same_step_are_decoded_together(gpu: FakeMachine) -> None:
    wishes = [{**TOGETHER, "seed": seed} for seed in (1, 2, 3)]
    with gpu.running() as running:
        before = running.device.launches["decode"]
        asked, _ = ask_together(running, wishes)
        together = [one.images()[0] for one in asked]
        assert running.device.launches["decode"] - before == 2, "the bundle's chunk is two images"
        alone = [running.ask(**fields).images()[0] for fields in wishes]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1)  # a call of two images may round otherwise


def test_a_cpu_decodes_one_image_at_a_time(cpu: Machine) -> None:
    with cpu.running() as running:
        asked, _ = ask_together(running, [{**TOGETHER, "seed": seed} for seed in (1, 2)])
        for one in asked:
            one.images()
        assert running.device.launches["decode"] == 2


@pytest.mark.parametrize(
    ("images", "failing", "expected"),
    [
        ((1, 2), 2, ["Completed", "StepFailed"]),
        ((1, 2), 1, ["StepFailed", "StepFailed"]),
        ((1, 1, 1), 1, ["StepFailed", "StepFailed", "Completed"]),
    ],
)
def test_a_call_that_fails_costs_only_the_requests_in_it(
    gpu: FakeMachine, images: Sequence[int], failing: int, expected: list[str]
) -> None:
    """A call takes two images: of two requests with one and two, the second one's are in both calls."""

    def fail() -> None:
        raise EngineError("out of order")

    with gpu.running() as running:
        free = entries(running)
        running.device.before("decode", running.device.launches["decode"] + failing, fail)
        asked, _ = ask_together(running, [{**TOGETHER, "num_images": count} for count in images])
        assert [one.outcome_name() for one in asked] == expected
        assert all(len(one.endings) == 1 for one in asked)
        assert running.ask().outcome_name() == "Completed"
        gpu.wait(lambda: entries(running) == free)
    assert not running.failures


def test_a_broken_picture_does_not_spoil_the_call_it_is_decoded_in(gpu: FakeMachine) -> None:
    with gpu.running() as running:

        def poison() -> None:
            placement = running.executor._requests.owned[requests[0]]
            assert isinstance(placement, Placement)
            pool = running.pipeline._latent_pools[requests[0].params.size]
            state = pool._states[pool._parity]
            nothing = np.full(state.shape[1:], np.nan, np.float32)
            running.pipeline._streams.steps.write(state, nothing, at=placement.slots[0])

        running.device.before("denoise", running.device.launches["denoise"] + 2, poison)
        before = running.device.launches["decode"]
        asked, requests = ask_together(running, [{**TOGETHER, "seed": seed} for seed in (1, 2)])
        assert [one.outcome_name() for one in asked] == ["BrokenPicture", "Completed"]
        assert running.device.launches["decode"] - before == 1


def test_a_decode_is_launched_behind_the_last_step_before_that_is_done(gpu: FakeMachine) -> None:
    with gpu.running() as running:
        before = running.device.launches["decode"]
        with gpu.gate(running.pipeline._streams.steps):
            asked = running.ask(num_inference_steps=2, scheduler="ddim")
            gpu.wait(lambda: running.device.launches["decode"] > before)
            assert not asked.steps, "no step was done"
        images = asked.images()
        assert [type(event) for event in asked.events[-3:]] == [Stepped, Stepped, Completed]
        np.testing.assert_array_equal(images, running.ask(num_inference_steps=2, scheduler="ddim").images())


def test_on_a_cpu_callers_hear_of_the_last_step_before_its_image_is_decoded(cpu: Machine) -> None:
    heard: list[list[int]] = []
    with cpu.running() as running:
        asked = Asked()
        request = running.request(asked, num_inference_steps=3, scheduler="ddim")
        running.device.before("decode", 1, lambda: heard.append(asked.steps))
        running.batcher.submit(request)
        asked.images()
    assert heard == [[1, 2, 3]]


def test_stages_last_as_long_as_the_host_sees(gpu: FakeMachine) -> None:
    """The decode is launched before the last step is done: its stage begins when that is seen to be done."""
    with gpu.running() as running, gpu.gate(running.pipeline._streams.decode):
        asked = Asked()
        request = running.request(asked, num_inference_steps=3, scheduler="ddim")
        running.batcher.submit(request)
        asked.wait(lambda: "denoise" in request.timings)
        assert asked.steps == [1, 2, 3]
        assert "decode" not in request.timings
    assert asked.outcome_name() == "Completed"
    assert set(request.timings) == {"queue", "encode", "denoise", "decode"}


def test_who_cancels_once_the_decode_is_launched_gets_the_image(gpu: FakeMachine) -> None:
    with gpu.running() as running:
        before = running.device.launches["decode"]
        with gpu.gate(running.pipeline._streams.steps):
            (asked,), (request,) = ask_together(running, [TOGETHER | {"num_inference_steps": 2}])
            gpu.wait(lambda: running.device.launches["decode"] > before)
            request.cancel()
        assert asked.outcome_name() == "Completed"
        assert len(asked.endings) == 1


def test_a_request_that_fails_while_it_is_decoded_keeps_its_entries_until_nobody_reads_them(
    gpu: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gpu.running() as running:
        free = entries(running)
        released: list[bool] = []

        def fail(_reading: object) -> None:
            raise RuntimeError("a bug")

        done = PendingDecode.release

        def release(pending: PendingDecode) -> None:
            done(pending)
            released.append(all(call.done() for call, _ in pending.decoded))

        monkeypatch.setattr(running.pipeline, "to_rgb", fail)
        monkeypatch.setattr(PendingDecode, "release", release)
        with gpu.gate(running.pipeline._streams.steps):
            asked = running.ask(num_inference_steps=2, scheduler="ddim", preview_every=1)
            gpu.wait(lambda: running.device.launches["decode"])
        assert asked.outcome_name() == "StepFailed"
        gpu.wait(lambda: released and not running.executor.decoding)
        assert all(released)
        assert len(asked.endings) == 1
        assert entries(running) == free
        assert running.ask().outcome_name() == "Completed"


def test_steps_wait_while_more_images_are_finished_than_the_decoder_can_use(gpu: FakeMachine) -> None:
    """Of four rows, two images may wait: a step that would finish a third one is not launched."""
    with gpu.running() as running:
        before = running.device.launches["denoise"]
        with gpu.gate(running.pipeline._streams.decode):
            asked, _ = ask_together(running, [{**TOGETHER, "num_inference_steps": steps} for steps in (1, 2, 4)])
            asked[2].wait(lambda: len(asked[2].steps) == 3)
            time.sleep(0.05)
            assert running.device.launches["denoise"] == before + 3
            assert not any(one.endings for one in asked)
        assert [one.outcome_name() for one in asked] == ["Completed"] * 3
