"""The loop over real engines: on the CPU, and on a GPU that is the host (`tests/engines/backends/fake_cuda`)."""

from __future__ import annotations

import io
import threading
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from benchmarks.spans import read_trace
from engines.accuracy import psnr
from engines.contract import GraphName
from engines.errors import DeviceLost, EngineError
from server.requests.depths import DEPTHS
from server.requests.params import Image
from server.runtime.monitoring import watchdog
from server.runtime.monitoring.trace import Trace
from server.runtime.pipeline.admission import Owned, Placement
from server.runtime.pipeline.noise import NoiseGenerator
from tests.support.executing import Asked, Running
from tests.support.machines import FakeMachine, Machine

CROWD: list[dict[str, Any]] = [
    {"seed": 1, "num_inference_steps": 6, "scheduler": "ddim"},
    {"seed": 2, "num_inference_steps": 9, "scheduler": "euler_ancestral", "guidance_scale": 3},
    {"seed": 3, "num_inference_steps": 4, "scheduler": "dpmpp_2m_karras", "guidance_scale": 1, "num_images": 3},
    {"seed": 4, "num_inference_steps": 7, "prompt": "a red cat " * 60},
    {"seed": 5, "num_inference_steps": 5, "width": 48, "scheduler": "heun", "preview_every": 2},
    {"seed": 7, "num_inference_steps": 8, "cache": "fast"},
    {"seed": 8, "num_inference_steps": 7, "cache": "fast", "num_images": 2, "guidance_start": 0.5, "preview_every": 2},
    {"seed": 9, "num_inference_steps": 5, "cache": "fast", "guidance_scale": 1, "prompt": "a red cat " * 60},
    {"seed": 6, "num_inference_steps": 8, "exact": True},
]


def alike(image: Image, other: Image) -> bool:
    return psnr(image, other) >= 50


def test_everyone_gets_the_picture_they_would_get_alone(machine: Machine) -> None:
    with machine.running() as running:
        together = [asked.images() for asked in [running.ask(**fields) for fields in CROWD]]
        alone = [running.ask(**fields).images() for fields in CROWD]
    for crowd, solo in zip(together, alone, strict=True):
        assert all(alike(one, other) for one, other in zip(crowd, solo, strict=True))
    np.testing.assert_array_equal(together[-1], alone[-1], err_msg="exact")


def test_a_short_request_takes_turns_with_long_ones_and_changes_none_of_their_images(machine: Machine) -> None:
    long = {"num_inference_steps": 24, "scheduler": "euler_ancestral"}
    with machine.running() as running:
        rows = running.manifest.max_rows
        with running.batcher._changed:  # all of them before the first step
            crowd = [running.ask(seed=seed, **long) for seed in range(rows // 2)]
        crowd[0].wait(lambda: crowd[0].steps)
        short = running.ask(seed=100, num_inference_steps=2)
        shared = short.images()
        assert running.ended[0] is short
        together = [asked.images() for asked in crowd]
        alone = [running.ask(seed=seed, **long).images() for seed in range(rows // 2)]
        short_alone = running.ask(seed=100, num_inference_steps=2).images()
    for images, solo in zip([shared, *together], [short_alone, *alone], strict=True):
        assert alike(images[0], solo[0])


def test_each_hears_every_step_once_and_in_order(machine: Machine) -> None:
    with machine.running() as running:
        crowd = [running.ask(**fields) for fields in CROWD]
        for asked in crowd:
            asked.images()
    for asked, fields in zip(crowd, CROWD, strict=True):
        calls = fields["num_inference_steps"] * 2 - 1 if fields.get("scheduler") == "heun" else len(asked.steps)
        assert asked.steps == list(range(1, calls + 1))
        assert len(asked.endings) == 1


def test_with_the_cache_steps_are_shallow(machine: Machine) -> None:
    with machine.running() as running:
        before = running.device.launches.copy()
        cached = running.ask(num_inference_steps=7, scheduler="ddim", cache="fast").images()
        launched = running.device.launches - before
        assert (launched["denoise"], launched["denoise_shallow"]) == (5, 2)
        (plain,) = running.ask(num_inference_steps=7, scheduler="ddim").images()
        assert running.device.launches["denoise_shallow"] - before["denoise_shallow"] == 2
    assert not np.array_equal(cached[0], plain)


def free_places(running: Running) -> list[list[int]]:
    """The free slots, staging entries and feature places of each size."""
    pools = ((one._slots, one._entries, one._places) for one in running.pipeline._latent_pools.values())
    return [sorted(pool) for each in pools for pool in each]


def test_nothing_is_held_when_all_have_left(machine: Machine) -> None:
    with machine.running() as running:
        before = free_places(running)
        for _ in range(2):
            for asked in [running.ask(**fields) for fields in CROWD]:
                asked.images()
        assert not running.pipeline._prompts._cache._users
        assert running.batcher.running == running.batcher.waiting == running.executor.decoding == 0
        assert free_places(running) == before


@pytest.mark.parametrize(("step", "ended"), [(1, "ab"), (2, "c"), (3, "ab"), (5, "d")])
def test_an_engine_that_fails_ends_those_who_shared_the_step(cpu: Machine, step: int, ended: str) -> None:
    """Steps are of a+b, c, a+b, c, d, d: c is of another size, and d has to wait for a and b."""

    def fail() -> None:
        raise EngineError("out of order")

    with cpu.running() as running:
        running.device.before("denoise", step, fail)
        asked = {name: Asked() for name in "abcd"}
        requests = [
            running.request(
                asked[name], num_inference_steps=2, num_images=2, width=48 if name == "c" else 32, scheduler="ddim"
            )
            for name in "abcd"
        ]
        with running.batcher._changed:  # all of them before the first step
            for request in requests:
                running.batcher.submit(request)
        outcomes = {name: one.outcome_name() for name, one in asked.items()}
        assert outcomes == {name: "StepFailed" if name in ended else "Completed" for name in "abcd"}
        assert running.ask().outcome_name() == "Completed"
    assert not running.failures


def test_a_fault_nobody_expected_leaves_nobody_waiting(cpu: Machine) -> None:
    fault = RuntimeError("a bug")

    def fail() -> None:
        raise fault

    with cpu.running() as running:
        running.device.before("denoise", 3, fail)
        with running.batcher._changed:  # all of them before the fault
            crowd = [running.ask(num_inference_steps=50, num_images=2) for _ in range(6)]
        assert [asked.outcome_name() for asked in crowd] == ["NotReady"] * 6
        assert not running.executor.ready
    assert running.failures == [fault]


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_fault_while_places_are_freed_leaves_nobody_waiting(
    cpu: Machine, monkeypatch: pytest.MonkeyPatch, *, cancelled: bool
) -> None:
    def fail(_owned: Owned) -> None:
        raise RuntimeError("a bug")

    with cpu.running() as running:
        monkeypatch.setattr(Owned, "release", fail)
        asked = [Asked() for _ in range(5)]
        requests = [running.request(one, num_inference_steps=50, num_images=2) for one in asked]
        with running.batcher._changed:
            for request in requests:
                running.batcher.submit(request)
        if cancelled:
            asked[0].wait(lambda: asked[0].steps)  # one that holds nothing has nothing to free
            requests[0].cancel()
        assert {one.outcome_name() for one in asked} == {"NotReady"}
        assert all(len(one.endings) == 1 for one in asked)
    assert isinstance(running.failures[0], RuntimeError)


def test_an_engine_that_fails_to_decode_ends_one_request(cpu: Machine) -> None:
    def fail() -> None:
        raise EngineError("out of order")

    with cpu.running() as running:
        running.device.before("decode", 2, fail)
        crowd = [running.ask(num_inference_steps=steps, num_images=2) for steps in (2, 4)]
        assert [asked.outcome_name() for asked in crowd] == ["StepFailed", "Completed"]
        assert running.ask(num_images=4).outcome_name() == "Completed", "its places were not freed"


def test_noise_is_drawn_beside_the_executor_and_what_fails_in_it_is_one_requests(
    cpu: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    randn, drawing = NoiseGenerator.randn, list[str]()

    def watched(generator: NoiseGenerator, shape: tuple[int, ...]) -> Any:
        drawing.append(threading.current_thread().name)
        return randn(generator, shape)

    def fail() -> None:
        placement = running.executor._requests.owned[requests[0]]
        assert isinstance(placement, Placement)
        monkeypatch.setattr(placement.noise, "_generators", (None,))

    with cpu.running() as running:
        monkeypatch.setattr(NoiseGenerator, "randn", watched)
        running.device.before("denoise", 2, fail)
        asked = [Asked() for _ in range(2)]
        requests = [running.request(one, num_inference_steps=4, scheduler="euler_ancestral") for one in asked]
        with running.batcher._changed:
            for request in requests:
                running.batcher.submit(request)
        assert [one.outcome_name() for one in asked] == ["StepFailed", "Completed"]
    # Both draw x and the first noise in the executor; of the second, one draws two more and the other none.
    assert sorted(drawing) == ["executor"] * 4 + ["noise_0"] * (len(drawing) - 4)
    assert len(drawing) > 4
    assert not any(thread.is_alive() for thread in running.executor._steps.noise._thread._threads)


def test_an_encoder_that_fails_ends_one_request(cpu: Machine) -> None:
    def fail() -> None:
        raise EngineError("out of order")

    with cpu.running() as running:
        running.device.before("encode_prompt", 1, fail)
        crowd = [running.ask(prompt=prompt, num_inference_steps=2) for prompt in ("a boat", "a bird")]
        assert [asked.outcome_name() for asked in crowd] == ["StepFailed", "Completed"]


@pytest.mark.parametrize("graph", ["encode_prompt", "encode_image", "denoise", "decode"])
def test_a_request_that_fails_at_any_stage_releases_everything(cpu: Machine, graph: GraphName) -> None:
    def fail() -> None:
        raise EngineError("out of order")

    image = io.BytesIO()
    PIL.Image.new("RGB", (32, 32)).save(image, "png")
    fields: dict[str, Any] = {"num_images": 2, "cache": "fast", "num_inference_steps": 5, "image": image.getvalue()}
    with cpu.running() as running:
        before = free_places(running)
        running.device.before(graph, 2, fail)  # the second launch: something is held already
        asked = running.ask(**fields, negative_prompt="a green bird")
        assert asked.outcome_name() == "StepFailed"
        assert len(asked.endings) == 1
        assert running.ask(num_inference_steps=1).outcome_name() == "Completed"
    assert not running.pipeline._prompts._cache._users
    assert not running.executor._requests.owned
    assert free_places(running) == before


def test_a_request_cancelled_before_it_is_placed_releases_everything(gpu: FakeMachine) -> None:
    with gpu.running() as running:
        before = free_places(running)
        asked = Asked()
        request = running.request(asked, prompt="something new")
        launched = running.device.launches.copy()
        with gpu.gate(running.pipeline._streams.encode):
            running.batcher.submit(request)
            gpu.wait(lambda: running.device.launches["encode_prompt"] > launched["encode_prompt"])
            request.cancel()
        assert asked.outcome_name() == "Cancelled"
        assert not asked.events[:-1], "it was placed before it was cancelled"
    assert not running.pipeline._prompts._cache._users
    assert not running.executor._requests.owned
    assert free_places(running) == before


def test_who_is_cancelled_frees_the_place_of_others(machine: Machine) -> None:
    with machine.running() as running:
        leaving = Asked()
        request = running.request(leaving, num_inference_steps=200, num_images=2, scheduler="ddim")
        running.batcher.submit(request)
        leaving.wait(lambda: leaving.steps)
        staying = running.ask(num_inference_steps=2)
        request.cancel()
        assert leaving.outcome_name() == "Cancelled"
        assert staying.outcome_name() == "Completed"
        assert len(leaving.steps) < 200


def test_a_picture_that_is_not_a_number_fails_alone(machine: Machine) -> None:
    """NaN in what one request is told: the others' pictures stay as they are to the last bit."""
    company = {"seed": 7, "num_inference_steps": 4, "exact": False}
    with machine.running() as running:
        undisturbed = [running.ask(**company, prompt=prompt) for prompt in ("a boat", "a bird")]
        expected = [asked.images() for asked in undisturbed]

        def poison() -> None:
            pool = running.pipeline._latent_pools[running.manifest.resolutions[0]]
            placement = running.executor._requests.owned[request]
            assert isinstance(placement, Placement)
            slot = placement.slots[0]
            state = pool._states[pool._parity]
            nothing = np.full(state.shape[1:], np.nan, np.float32)
            running.pipeline._streams.steps.write(state, nothing, at=slot)

        running.device.before("denoise", running.device.launches["denoise"] + 2, poison)
        broken = Asked()
        request = running.request(broken, num_inference_steps=4)
        with running.batcher._changed:
            running.batcher.submit(request)
            disturbed = [running.ask(**company, prompt=prompt) for prompt in ("a boat", "a bird")]
        assert broken.outcome_name() == "BrokenPicture"
        for asked, images in zip(disturbed, expected, strict=True):
            assert all(alike(one, other) for one, other in zip(asked.images(), images, strict=True))
        assert running.metric("latentd_broken_pictures_total") == 1
        assert running.ask(**company, num_images=2).outcome_name() == "Completed", "its slot is sound again"


def test_the_curve_is_measured_before_ready_and_exported(machine: Machine) -> None:
    with machine.running() as running:
        curves = running.step_times.curves()
        assert set(curves) == set(product(running.manifest.resolutions, DEPTHS))
        rows = running.manifest.rows
        measured = set(rows) if running.device.pads else {rows[0], rows[-1]}
        assert all(set(curve) == measured for curve in curves.values())
        assert all(seconds > 0 for curve in curves.values() for seconds in curve.values())
        labels = f'depth="shallow",model="{running.manifest.name}",rows="{rows[-1]}",size="32x32"'
        exported = f"latentd_step_time_estimate_seconds{{{labels}}}"
        assert exported in running.metrics.render().decode()


def test_the_retry_of_who_is_refused_is_estimated_from_the_work_before_them(machine: Machine) -> None:
    with machine.running(max_waiting=1) as running:
        request = running.request(Asked(), num_inference_steps=100, scheduler="ddim")
        full = running.step_times.seconds((request.params.size, "full"), running.manifest.max_rows)
        assert running.step_times.work(request) == pytest.approx(full * 100 * 2 / running.manifest.max_rows)


# What only a device with streams can show


def test_steps_are_launched_ahead_but_no_further_than_two(gpu: FakeMachine) -> None:
    with gpu.running() as running:
        launched = running.device.launches
        with gpu.gate(running.pipeline._streams.steps):
            asked = running.ask(num_inference_steps=6, scheduler="ddim")
            gpu.wait(lambda: launched["denoise"] == 2)
            assert not asked.steps, "it was told before it was done"
            assert launched["denoise"] == 2
        asked.images()
        assert launched["denoise"] == 6


def test_others_step_while_pictures_are_decoded(gpu: FakeMachine) -> None:
    with gpu.running() as running, gpu.gate(running.pipeline._streams.decode):
        short, long = (running.ask(num_inference_steps=steps, scheduler="ddim") for steps in (2, 12))
        long.wait(lambda: len(long.steps) == 12)
        assert short.steps == [1, 2]
        assert not short.endings
        assert not long.endings


def test_others_step_while_newcomers_are_encoded(gpu: FakeMachine) -> None:
    with gpu.running() as running:
        first = running.ask(num_inference_steps=30, scheduler="ddim")
        first.wait(lambda: first.steps)
        with gpu.gate(running.pipeline._streams.encode):
            second = running.ask(prompt="something new", num_inference_steps=2)
            first.outcome()
            assert not second.events
        assert second.outcome_name() == first.outcome_name() == "Completed"


def test_decoding_between_the_steps_uses_their_stream(gpu: FakeMachine) -> None:
    with gpu.running(decode_priority="between") as running:
        assert running.pipeline._streams.decode is running.pipeline._streams.steps
        assert running.ask().outcome_name() == "Completed"


def test_more_pictures_than_places_wait_for_the_decoder(gpu: FakeMachine) -> None:
    """All staging places are taken while the decoder is held; nobody is lost by it, and nothing is overwritten."""
    with gpu.running() as running:
        wishes = [
            {"seed": seed, "num_inference_steps": 1, "guidance_scale": 1, "num_images": 4} for seed in (1, 20, 40)
        ]
        with gpu.gate(running.pipeline._streams.decode):
            crowd = [running.ask(**fields) for fields in wishes]
            crowd[0].wait(lambda: crowd[0].steps)
            assert running.device.launches["denoise"] <= 2
        pictures = [asked.images() for asked in crowd]
        alone = [running.ask(**fields).images() for fields in wishes]
    for one, other in zip(pictures, alone, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("decode_chunk", [1, 2])
def test_pictures_are_decoded_in_chunks_as_large_as_the_bundle_allows(gpu: FakeMachine, decode_chunk: int) -> None:
    with gpu.running(decode_chunk=decode_chunk) as running:
        before = running.device.launches["decode"]
        images = running.ask(num_images=3, guidance_scale=1).images()
        assert len(images) == 3
        assert running.device.launches["decode"] - before == (3 if decode_chunk == 1 else 2)


def test_everything_is_bound_and_recorded_before_ready(gpu: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "server.runtime.pipeline.latent_pool._MOST_BOUND", 1
    )  # which is for devices that record nothing
    with gpu.running() as running:
        bound, memory = len(running.device.bound), running.device.memory()
        recorded, launched = gpu.cuda.calls["cudaGraphLaunch"], sum(running.device.launches.values())
        for asked in [running.ask(**fields) for fields in CROWD]:
            asked.images()
        assert len(running.device.bound) == bound
        assert running.device.memory() == memory
        launched = sum(running.device.launches.values()) - launched
        assert gpu.cuda.calls["cudaGraphLaunch"] - recorded == launched, "something ran that had not been recorded"


def test_a_long_run_leaves_memory_as_it_was(gpu: FakeMachine) -> None:
    with gpu.running() as running:
        for asked in [running.ask(num_inference_steps=2, seed=seed) for seed in range(20)]:
            asked.images()
        device, graphs, pinned = gpu.cuda.live(pinned=False), gpu.cuda.graphs, len(gpu.cuda.live(pinned=True))
        for asked in [running.ask(num_inference_steps=2, seed=seed) for seed in range(60)]:
            asked.images()
        assert (gpu.cuda.live(pinned=False), gpu.cuda.graphs) == (device, graphs)
        # As many staging blocks as were in use at once, which differs a little with how threads take turns.
        assert len(gpu.cuda.live(pinned=True)) < pinned + 10


def test_a_lost_device_ends_the_process_and_nobody_waits(gpu: FakeMachine) -> None:
    with gpu.running() as running:
        crowd = [running.ask(num_inference_steps=60, num_images=2, seed=seed) for seed in range(6)]
        crowd[0].wait(lambda: crowd[0].steps)
        gpu.cuda.lose("cudaErrorIllegalAddress")
        assert [asked.outcome_name() for asked in crowd] == ["NotReady"] * 6
        gpu.wait(lambda: not running.executor.alive)
    (failure,) = running.failures
    assert isinstance(failure, DeviceLost)


def test_a_device_that_hangs_is_noticed(
    gpu: FakeMachine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(watchdog, "_MIN_LIMIT", 0.5)
    monkeypatch.setattr(watchdog, "_POLL", 0.05)
    with gpu.running(hang_factor=0.001) as running, gpu.gate(running.pipeline._streams.steps):
        crowd = [running.ask(num_inference_steps=3, seed=seed) for seed in range(6)]
        assert [asked.outcome_name() for asked in crowd] == ["NotReady"] * 6
        assert running.executor.hangs
        assert not running.executor.alive
    assert isinstance(running.failures[0], DeviceLost)
    assert "took longer than" in caplog.text
    assert "The last plan: of " in caplog.text
    assert "'slot': [" in caplog.text
    assert 'executor.py", line' in caplog.text, "no stack was logged"


def test_memory_that_is_full_at_start_says_what_takes_it(gpu: FakeMachine) -> None:
    gpu.cuda.total = 500_000
    with gpu.running() as running:
        (failure,) = running.failures
    assert isinstance(failure, EngineError)
    assert "state of 32x32" in str(failure)
    assert "--rows" in str(failure)


def test_a_trace_shows_steps_launched_ahead(gpu: FakeMachine, tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    with gpu.running(trace=trace) as running:
        for asked in [running.ask(num_inference_steps=8, seed=seed, scheduler="ddim") for seed in range(3)]:
            asked.images()
    spans = read_trace(tmp_path / "trace.json")
    steps = [span for span in spans if span.track == "steps"]
    launches = [span for span in spans if span.name == "launch"]
    assert len(steps) == len(launches)
    ahead = [launch for launch, before in zip(launches[1:], steps, strict=False) if launch.begin < before.end]
    assert len(ahead) >= len(steps) // 2, "steps were not launched before those before them were done"
    assert sum(int(span.name.removeprefix("decode, ")) for span in spans if span.track == "decode") == 3
