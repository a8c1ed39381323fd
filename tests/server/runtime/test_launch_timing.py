"""When steps are launched: newcomers join the next one, and the device never waits for it. In virtual time."""

from __future__ import annotations

import random
from functools import partial
from statistics import mean

import pytest

from engines.manifest import Size
from server.requests.request import BatchKey, Completed, Event, Stepped
from server.runtime.launch_timing import Key, LaunchTiming
from server.runtime.pipeline.plan import StepShape
from tests.support.virtual import Seconds, VirtualDevice, VirtualRun

STEP = 0.02  # seconds
ENCODE = 0.2 * STEP
LAUNCH = 0.0005  # of the host, for a step
KEY = (BatchKey("", Size(width=64, height=64)), StepShape(4, 4, 1))


def arrivals(seconds: Seconds, host: Seconds, *, count: int = 150) -> tuple[float, float]:
    """Two requests run all the time and others arrive at random: the mean steps that they wait, and the idle share."""
    run = VirtualRun(lambda clock: VirtualDevice(clock, seconds=seconds, host=host))
    rng = random.Random(5)
    waits: list[float] = []
    steps = run.device.streams

    def scenario() -> None:
        began = run.clock.now
        steps["steps"].idle = steps["steps"].busy = 0.0
        steps["steps"].free = began
        moments = [began + (4 + 6 * number + rng.random() * 3) * STEP for number in range(count)]

        def keep_running(event: Event) -> None:
            if isinstance(event, Completed) and run.clock.now < moments[-1]:
                run.ask(steps=200, seed=0, on_event=keep_running)

        def arrive(number: int) -> None:
            def hear(event: Event, arrived: float = run.clock.now) -> None:
                if isinstance(event, Stepped) and event.step == 1:
                    waits.append((run.clock.now - arrived) / STEP - 1)

            run.ask(steps=2, seed=number, on_event=hear)

        run.ask(steps=100, seed=0, on_event=keep_running)
        run.ask(steps=200, seed=0, on_event=keep_running)
        for number, moment in enumerate(moments, start=1):
            run.clock.at(moment, partial(arrive, number))
        run.clock.at(moments[-1] + 5 * STEP, run.close)

    run.run(scenario)
    assert len(waits) == count
    stream = steps["steps"]
    return mean(waits), stream.idle / (stream.idle + stream.busy)


def constant(graph: str, _rows: int) -> float:
    return {"denoise": STEP, "denoise_shallow": STEP, "encode_prompt": ENCODE, "decode": STEP / 2}.get(graph, 0.001)


def host(graph: str, _rows: int) -> float:
    return LAUNCH if graph == "denoise" else LAUNCH / 2


def jittering(seed: int) -> tuple[Seconds, Seconds]:
    """Steps vary by a few percent, and one in twenty is slowed by a decode; the host is late now and then."""
    rng = random.Random(seed)

    def seconds(graph: str, rows: int) -> float:
        slow = 1.4 if rng.random() < 0.05 else 1
        return constant(graph, rows) * slow * rng.uniform(0.97, 1.03)

    def launch(graph: str, rows: int) -> float:
        return host(graph, rows) * rng.uniform(0.8, 1.5) + (0.003 if rng.random() < 0.02 else 0)

    return seconds, launch


def at_once(_timing: LaunchTiming, _key: Key, _began: float) -> None:
    """Launch each step as soon as the one before it begins."""


def test_newcomers_join_the_next_step_and_the_device_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come in the middle of a step on average, and half of a step before its end it is decided who joins."""
    wait, idle = arrivals(constant, host)
    assert wait < 1.1
    assert idle < 0.001
    monkeypatch.setattr(LaunchTiming, "due", at_once)
    before, _ = arrivals(constant, host)
    assert before > wait + 1


@pytest.mark.parametrize("seed", [0, 1])
def test_jitter_of_steps_and_of_the_host_leaves_no_gaps(seed: int) -> None:
    wait, idle = arrivals(*jittering(seed))
    assert wait < 1.5
    assert idle < 0.01


def test_a_device_that_gets_faster_is_waited_for_less() -> None:
    """From one step on, all take half as long: late once, and a gap of less than the poll; then in time again."""
    steps = iter(range(10**9))

    def seconds(graph: str, rows: int) -> float:
        return constant(graph, rows) / (2 if graph == "denoise" and next(steps) > 300 else 1)

    _, idle = arrivals(seconds, host)
    assert idle < 0.005


def test_nothing_is_waited_for_before_a_step_of_that_shape_was_seen() -> None:
    timing = LaunchTiming()
    assert timing.due(KEY, 1.0) is None
    timing.observe(KEY, 0.1)
    assert timing.due(KEY, 1.0) == pytest.approx(1.094)


def test_a_launch_that_takes_longer_begins_earlier() -> None:
    timing = LaunchTiming()
    timing.observe(KEY, 0.1)
    due = timing.due(KEY, 1.0)
    assert due is not None
    timing.launched(due + 0.01, late=False)
    later = timing.due(KEY, 1.0)
    assert later == pytest.approx(due - 0.02)


def test_after_a_late_launch_steps_are_launched_at_once_each_time_for_longer() -> None:
    timing = LaunchTiming()
    timing.observe(KEY, 0.1)
    distrusted = []
    for _ in range(3):
        assert timing.due(KEY, 1.0) is not None
        timing.launched(1.1, late=True)
        distrusted.append(next(count for count in range(10**4) if timing.due(KEY, 1.0) is not None))
    assert distrusted == [16, 32, 64]
