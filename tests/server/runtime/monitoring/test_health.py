"""Readiness follows whether images succeed, and a bundle whose images cannot succeed does not become ready."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engines.errors import EngineError
from server.requests.errors import BrokenPicture, Cancelled, InvalidRequest, QueueFull, StepFailed
from server.requests.request import Completed, Failed, Outcome
from server.runtime.monitoring.health import Health
from server.runtime.pipeline.admission import PendingDecode
from tests.support.machines import Machine

BROKEN = Failed(BrokenPicture("NaN"))


def ignore() -> None:
    """Draw no test image."""


def test_eight_faults_in_a_row_are_a_reason_until_an_image_succeeds() -> None:
    health = Health(ignore)

    def reason_after(*outcomes: Outcome) -> str:
        for outcome in outcomes:
            health.observe(outcome)
        return health.reason

    assert not reason_after(*[BROKEN, Failed(StepFailed("no")), Failed(Cancelled("left"))] * 3, BROKEN)
    assert reason_after(BROKEN) == "the last 8 requests failed, of which the last said: NaN"
    assert reason_after(Failed(Cancelled("left")))
    assert not reason_after(Completed(()))


def test_a_test_image_is_drawn_now_and_then_while_nothing_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    times = [100.0, 101.0, 104.9, 105.0, 109.0, 111.0]
    monkeypatch.setattr("server.runtime.monitoring.health.time.monotonic", lambda: times[0])

    def submit() -> None:
        drawn.append(times[0])
        raise QueueFull("full of requests that tell as much")

    health = Health(submit)
    health.test()
    for _ in range(8):
        health.observe(BROKEN)
    while times:
        health.test()
        times.pop(0)
    assert drawn == [100.0, 105.0, 111.0]


def break_images(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let every image be broken; returns what ends it."""
    sound = PendingDecode.images

    def broken(_pending: PendingDecode) -> None:
        raise BrokenPicture("The model computed NaN.")

    monkeypatch.setattr(PendingDecode, "images", broken)
    return lambda: monkeypatch.setattr(PendingDecode, "images", sound)


def test_an_executor_is_ready_again_without_a_request(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Health, "test_every", 0.05)
    with cpu.running() as running:
        assert running.executor.readiness == (True, "ready")
        mend = break_images(monkeypatch)
        crowd = [running.ask(num_inference_steps=1, seed=seed) for seed in range(9)]
        assert {asked.outcome_name() for asked in crowd} == {"BrokenPicture"}
        ready, reason = running.executor.readiness
        assert not ready
        assert "requests failed, of which the last said: The model computed NaN." in reason
        assert running.metric("latentd_ready") == 0
        assert running.executor.ready, "requests are accepted all the same"
        mend()
        running.wait(lambda: running.executor.readiness == (True, "ready"))
        assert running.metric("latentd_requests_total") == 9, "test images are no requests"


def test_a_model_that_draws_nothing_finite_does_not_become_ready(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    break_images(monkeypatch)
    with cpu.running() as running:
        (failure,) = running.failures
        assert isinstance(failure, EngineError)
        assert str(failure) == "A test image failed, so every request would: The model computed NaN."
        assert not running.executor.was_ready


def test_defaults_that_allow_no_request_are_named(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise InvalidRequest("500 steps are too many.")

    monkeypatch.setattr("server.requests.intake.Intake.request", refuse)
    with cpu.running() as running:
        (failure,) = running.failures
        assert str(failure) == "No request can be served by this bundle's defaults: 500 steps are too many."
