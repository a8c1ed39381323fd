"""Every accepted request has one outcome, whatever happens to it or to the executor; a fault of one stays with it."""

from __future__ import annotations

import io
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import PIL.Image
import pytest

from engines.errors import DeviceLost, EngineError
from server.requests.errors import NotReady
from server.runtime.pipeline.admission import PendingDecode
from server.runtime.pipeline.pipeline import Pipeline
from tests.support.executing import Asked, Running
from tests.support.machines import FakeMachine, Machine

FIELDS: dict[str, Any] = {"num_images": 2, "cache": "fast", "num_inference_steps": 5, "preview_every": 1}


def upload() -> bytes:
    image = io.BytesIO()
    PIL.Image.new("RGB", (32, 32)).save(image, "png")
    return image.getvalue()


def held(running: Running) -> object:
    """What requests hold, and what is free."""
    pools = running.pipeline._latent_pools.values()
    free = [(sorted(pool._slots), sorted(pool._entries), sorted(pool._places)) for pool in pools]
    return free, +running.pipeline._prompts._cache._users, list(running.executor._requests.owned)


def outcomes(running: Running) -> float:
    return running.metric("latentd_requests_total")


@pytest.mark.parametrize("call", ["admit", "place", "decode", "to_rgb"])
@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError(), ImportError("numpy.random")])
def test_any_fault_of_one_request_stays_with_it(
    cpu: Machine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    error: Exception,
) -> None:
    with cpu.running() as running:
        before = held(running)
        sound = getattr(Pipeline, call)

        def once(*_arguments: object) -> object:
            monkeypatch.setattr(Pipeline, call, sound)
            raise error

        monkeypatch.setattr(Pipeline, call, once)
        asked = running.ask(**FIELDS, image=upload())
        assert asked.outcome_name() == "StepFailed"
        assert running.ask(**FIELDS).outcome_name() == "Completed"
        assert type(error).__name__ in caplog.text, "the log does not say why"
    assert not running.failures
    assert held(running) == before


def test_a_fault_while_images_are_read_stays_with_their_request(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with cpu.running() as running:
        sound = PendingDecode.images

        def once(_pending: PendingDecode) -> None:
            monkeypatch.setattr(PendingDecode, "images", sound)
            raise MemoryError

        monkeypatch.setattr(PendingDecode, "images", once)
        assert running.ask(**FIELDS).outcome_name() == "StepFailed"
        assert running.ask(**FIELDS).outcome_name() == "Completed"


@pytest.mark.parametrize("graph", ["encode_prompt", "encode_image", "decode"])
def test_what_fails_within_a_call_is_released(cpu: Machine, graph: Any) -> None:
    def fail() -> None:
        raise MemoryError

    with cpu.running() as running:
        before = held(running)
        running.device.before(graph, 2, fail)  # the second launch: something is held already
        assert running.ask(**FIELDS, image=upload(), negative_prompt="a green bird").outcome_name() == "StepFailed"
        assert running.ask(num_inference_steps=1).outcome_name() == "Completed"
    assert held(running) == before


def test_a_lost_device_is_no_fault_of_one_request(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_arguments: object) -> None:
        raise DeviceLost("CUDA error 700")

    with cpu.running() as running:
        monkeypatch.setattr(Pipeline, "admit", lose)
        assert running.ask().outcome_name() == "NotReady"
    assert isinstance(running.failures[0], DeviceLost)


def test_a_listener_that_fails_harms_nobody(cpu: Machine) -> None:
    def fail(*_arguments: object) -> None:
        raise RuntimeError("a bug")

    with cpu.running() as running:
        asked = Asked()
        request = running.request(asked, num_inference_steps=2, scheduler="ddim")
        request.listeners = (fail, *request.listeners)
        running.batcher.submit(request)
        assert asked.outcome_name() == "Completed"
        assert asked.steps == [1, 2]


def test_who_waits_is_answered_without_the_device(gpu: FakeMachine) -> None:
    with gpu.running() as running:
        with gpu.gate(running.pipeline._streams.steps):
            crowd = [running.ask(num_inference_steps=6, scheduler="ddim", num_images=2) for _ in range(6)]
            gpu.wait(lambda: running.device.launches["denoise"] == 2)
            running.executor.cancel_everyone()
            running.executor.answer_everyone()
            assert {asked.outcome_name() for asked in crowd} == {"ServerStopping"}
        gpu.wait(lambda: not running.executor.alive)
    assert {len(asked.endings) for asked in crowd} == {1}
    assert not running.failures


def lose_the_device(running: Running) -> None:
    def lose() -> None:
        raise DeviceLost("CUDA error 700")

    running.device.before("denoise", running.device.launches["denoise"] + 3, lose)


def fail_a_step(running: Running) -> None:
    def fail() -> None:
        raise EngineError("out of order")

    running.device.before("denoise", running.device.launches["denoise"] + 3, fail)


ENDS: list[Callable[[Running], None]] = [
    lambda running: running.executor.stop_accepting(),
    lambda running: running.executor.cancel_everyone(),
    lambda running: running.executor.answer_everyone(),
    lose_the_device,
    fail_a_step,
]


@pytest.mark.parametrize("end", ENDS, ids=["drains", "cancels", "answers", "loses-device", "fails-a-step"])
def test_accepted_is_the_sum_of_the_outcomes(cpu: Machine, end: Callable[[Running], None]) -> None:
    """While callers come and leave from several threads, and then the executor ends."""
    everyone: list[tuple[Asked, bool]] = []  # and whether they were accepted
    ending = threading.Event()

    def call(running: Running, number: int) -> None:
        for seed in range(12):
            asked = Asked()
            request = running.request(asked, seed=seed, num_inference_steps=3 + seed % 3, num_images=1 + number % 2)
            try:
                running.batcher.submit(request)
            except NotReady:
                everyone.append((asked, False))
                continue
            everyone.append((asked, True))
            if seed % 4 == number:
                request.cancel()
            if seed == 4:
                ending.set()

    with cpu.running() as running:
        callers = [threading.Thread(target=call, args=(running, number)) for number in range(3)]
        for caller in callers:
            caller.start()
        assert ending.wait(60)
        end(running)
        for caller in callers:
            caller.join()
    accepted = [asked for asked, was_accepted in everyone if was_accepted]
    assert len(everyone) == 3 * 12
    assert len(accepted) >= 5
    assert {len(asked.endings) for asked in accepted} == {1}
    assert not [asked for asked, was_accepted in everyone if not was_accepted and asked.events]
    assert outcomes(running) == len(accepted), Counter(asked.outcome_name() for asked in accepted)
