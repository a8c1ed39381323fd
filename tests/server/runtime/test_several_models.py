"""Several models in one executor: their images, loading and unloading under load, and what goes wrong."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.backends.available import engine_path
from engines.backends.onnxruntime import OnnxRuntimeDevice
from engines.contract import DecoderName
from engines.demo import BUNDLE
from engines.errors import DeviceLost, EngineError
from engines.manifest import Manifest
from server.requests.errors import ModelNotLoaded, NotReady, UnknownModel
from server.runtime.failures import StartStopped
from server.runtime.models import ModelSource, OnStatus, State, Stopped, needed_memory
from server.runtime.pipeline.admission import DecodeCall
from server.runtime.pipeline.latent_pool import LatentPool
from tests.server.runtime.test_executor import alike
from tests.support.executing import Asked, Running
from tests.support.machines import FakeMachine

BRIEF: dict[str, Any] = {"num_inference_steps": 2, "scheduler": "ddim"}


def source(bundle: Path, name: str = "other", *, backend: str = "onnxruntime", **options: Any) -> ModelSource:
    return ModelSource(name=name, manifest=Manifest.read(bundle), bundle=bundle, backend=backend, **options)


def demo(*others: ModelSource, **options: Any) -> Running:
    """An executor over the demo bundle, which is the default model, and `others`."""
    return Running(BUNDLE, lambda: OnnxRuntimeDevice(threads=1), others=others, **options)


def reaches(running: Running, state: State, name: str = "other") -> None:
    running.wait(lambda: running.models.find(name).state in (state, "failed"))
    assert running.models.find(name).state == state, running.models.find(name).reason


def test_each_model_draws_what_it_draws_alone(bundle: Path) -> None:
    """They differ in weights, sizes, rows and prompts' length; some requests share steps, others do not."""
    crowd = [{"seed": seed, "num_inference_steps": seed + 2, "exact": seed == 4} for seed in range(5)]
    names = ("", "other")
    with demo(source(bundle)) as running:
        with running.batcher._changed:  # all of them before the first step
            together = {name: [running.ask(model=name, **one) for one in crowd] for name in names}
        images = {name: [asked.images()[0] for asked in asked_of] for name, asked_of in together.items()}
    for name, alone in zip(names, (BUNDLE, bundle), strict=True):
        with Running(alone, lambda: OnnxRuntimeDevice(threads=1)) as solo:
            expected = [solo.ask(**one).images()[0] for one in crowd]
        assert all(map(alike, images[name], expected))
        np.testing.assert_array_equal(images[name][-1], expected[-1], err_msg="exact")


class Load(AbstractContextManager["Load"]):
    """Callers who ask for images of a model again and again until they are stopped."""

    def __init__(self, running: Running, *models: str) -> None:
        self.asked: list[Asked] = []
        self.refused = 0
        self._running = running
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(model,)) for model in models]
        for thread in self._threads:
            thread.start()

    def _ask(self, model: str) -> None:
        while not self._stopped.is_set():
            try:
                asked = self._running.ask(model=model, **BRIEF)
            except ModelNotLoaded:
                self.refused += 1
                self._stopped.wait(0.002)
            else:
                self.asked.append(asked)
                asked.outcome()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def stop(self) -> list[str]:
        """End, and return how requests ended."""
        self.__exit__()
        assert all(len(asked.endings) == 1 for asked in self.asked)
        return [asked.outcome_name() for asked in self.asked]


def test_a_model_is_loaded_and_unloaded_again_and_again_under_load(bundle: Path) -> None:
    memory = []
    with demo(source(bundle, at_start=False)) as running, Load(running, "", "other", "other") as load:
        for _ in range(3):
            running.models.load("other")
            reaches(running, "ready")
            served = running.ask(model="other", **BRIEF)
            running.models.unload("other")
            reaches(running, "unloaded")
            assert served.outcome_name() == "Completed", "it was accepted before"
            memory.append({name: size for name, size in running.device.memory().items() if "32x32" in name})
        names = load.stop()
        assert set(names) == {"Completed"}
        assert load.refused
    assert memory == [{}] * 3


def test_whatever_is_asked_at_the_same_time_each_accepted_request_has_one_ending(bundle: Path) -> None:
    order = random.Random(7)
    with demo(source(bundle, at_start=False)) as running, Load(running, "", "other", "other", "other") as load:
        for _ in range(25):
            order.choice([running.models.load, running.models.unload])("other")
            threading.Event().wait(order.choice([0, 0.001, 0.02]))
        running.models.load("other")
        running.models.load("other")
        reaches(running, "ready")
        assert running.ask(model="other", **BRIEF).outcome_name() == "Completed"
        assert set(load.stop()) == {"Completed"}
    assert not running.failures


def test_a_load_that_is_given_up_leaves_nothing(bundle: Path) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def prepare(_backend: str, _on_status: OnStatus, stopped: Stopped) -> Manifest:
        loading.set()
        go_on.wait()
        assert stopped()
        raise StartStopped("it was stopped")

    with demo(source(bundle, prepare=prepare, at_start=False)) as running:
        running.models.load("other")
        loading.wait()
        assert running.ask(**BRIEF).outcome_name() == "Completed", "others are served meanwhile"
        running.models.unload("other")
        with pytest.raises(ModelNotLoaded):
            running.ask(model="other")
        go_on.set()
        reaches(running, "unloaded")
    assert not running.failures


def test_a_broken_file_fails_its_model_alone_and_it_may_be_loaded_again(bundle: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(bundle, tmp_path / "broken"))
    path = broken / engine_path(Manifest.read(broken), "onnxruntime", "decode")
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    unloaded: list[None] = []
    with demo(source(broken, on_unloaded=lambda: unloaded.append(None))) as running:
        other = running.models.find("other")
        assert (other.state, running.models.default.state) == ("failed", "ready")
        assert "decode" in other.reason
        assert unloaded
        assert not [name for name in running.device.memory() if "32x32" in name]
        with pytest.raises(ModelNotLoaded, match="could not be loaded"):
            running.ask(model="other")
        assert running.executor.readiness[0]
        path.write_bytes(sound)
        running.models.load("other")
        reaches(running, "ready")
        assert running.ask(model="other", **BRIEF).outcome_name() == "Completed"
        assert running.ask(**BRIEF).outcome_name() == "Completed"


def test_a_model_whose_test_image_fails_is_not_served(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = LatentPool.decode

    def fail(pool: LatentPool, entries: Sequence[int], decoder: DecoderName) -> DecodeCall:
        if pool.size in Manifest.read(bundle).resolutions:
            raise EngineError("out of order")
        return decode(pool, entries, decoder)

    with demo(source(bundle, at_start=False)) as running:
        monkeypatch.setattr(LatentPool, "decode", fail)
        running.models.load("other")
        running.wait(lambda: running.models.find("other").state == "failed")
        assert "out of order" in running.models.find("other").reason
        assert running.ask(**BRIEF).outcome_name() == "Completed"


def test_the_default_model_must_load_at_the_start(bundle: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(bundle, tmp_path / "broken"))
    (broken / engine_path(Manifest.read(broken), "onnxruntime", "decode")).write_bytes(b"nothing")
    with Running(broken, lambda: OnnxRuntimeDevice(threads=1), others=[source(BUNDLE)]) as running:
        assert len(running.failures) == 1
        assert not running.executor.ready


def test_an_unloaded_default_is_no_reason_to_be_unready_while_another_is_served(bundle: Path) -> None:
    with demo(source(bundle)) as running:
        running.models.unload("")
        reaches(running, "unloaded", "")
        assert running.executor.readiness == (True, "ready")
        assert running.ask(model="other", **BRIEF).outcome_name() == "Completed"
        running.models.unload("other")
        reaches(running, "unloaded")
        assert running.executor.readiness == (False, "no model is loaded")
        with pytest.raises(UnknownModel, match="other"):
            running.models.load("nothing")


def test_accepted_requests_of_every_model_finish_when_the_server_drains(bundle: Path) -> None:
    with demo(source(bundle)) as running:
        crowd = [running.ask(model=name, num_inference_steps=9) for name in ("", "other") * 3]
        running.executor.close()
        assert {asked.outcome_name() for asked in crowd} == {"Completed"}
        with pytest.raises(NotReady):
            running.ask(model="other")


def test_cancelled_requests_of_one_model_leave_those_of_the_other(bundle: Path) -> None:
    with demo(source(bundle)) as running:
        leaving, asked = Asked(), [running.ask(num_inference_steps=20)]
        request = running.request(leaving, model="other", num_inference_steps=200)
        running.batcher.submit(request)
        leaving.wait(lambda: leaving.steps)
        request.cancel()
        assert leaving.outcome_name() == "Cancelled"
        assert asked[0].outcome_name() == "Completed"
        assert running.batcher.is_idle("other")


# The memory for models


def test_models_without_requests_make_room_for_others() -> None:
    """Two fit together; a third takes the place of the one that was idle for longest, and not the default's."""
    others = [source(BUNDLE, name, at_start=False) for name in ("first", "second")]
    size = needed_memory(Manifest.read(BUNDLE), BUNDLE, "onnxruntime")
    with demo(*others, model_memory=5 * size // 2 // 2**20) as running:
        running.models.load("first")
        reaches(running, "ready", "first")
        assert running.ask(**BRIEF).outcome_name() == "Completed"
        running.models.load("second")
        reaches(running, "ready", "second")
        assert {model.name: model.state for model in running.models} == {
            running.manifest.name: "ready",
            "first": "unloaded",
            "second": "ready",
        }


def test_a_model_that_has_no_room_is_refused_with_what_to_do() -> None:
    size = needed_memory(Manifest.read(BUNDLE), BUNDLE, "onnxruntime")
    with demo(source(BUNDLE, at_start=False), model_memory=3 * size // 2 // 2**20) as running:
        busy = running.ask(num_inference_steps=200)
        busy.wait(lambda: busy.steps)
        with pytest.raises(ModelNotLoaded, match="unload another one first"):
            running.models.load("other")
        assert running.models.find("other").state == "unloaded"
        running.batcher.cancel()


# On a GPU that is the host


def second(gpu: FakeMachine, **options: Any) -> ModelSource:
    return source(gpu.bundle, backend=gpu.backend, **options)


def test_unloading_frees_what_loading_took(gpu: FakeMachine) -> None:
    with gpu.running(others=[second(gpu, at_start=False)]) as running:
        assert running.ask(**BRIEF).outcome_name() == "Completed"
        held, streams = [], len(gpu.cuda._streams)
        for _ in range(2):
            before = len(gpu.cuda.live()), gpu.cuda.graphs
            running.models.load("other")
            reaches(running, "ready")
            assert running.ask(model="other", **BRIEF, preview_every=1).outcome_name() == "Completed"
            assert (len(gpu.cuda.live()), gpu.cuda.graphs) > before
            running.models.unload("other")
            reaches(running, "unloaded")
            held.append((len(gpu.cuda.live()) - before[0], gpu.cuda.graphs - before[1]))
        assert held == [(0, 0)] * 2
        assert len(gpu.cuda._streams) == streams, "models share them"


def test_a_lost_device_ends_the_requests_of_every_model(gpu: FakeMachine) -> None:
    with gpu.running(others=[second(gpu)]) as running:
        crowd = [running.ask(model=name, num_inference_steps=60) for name in ("", "other") * 2]
        crowd[0].wait(lambda: crowd[0].steps)
        gpu.cuda.lose("cudaErrorIllegalAddress")
        assert [asked.outcome_name() for asked in crowd] == ["NotReady"] * 4
        gpu.wait(lambda: not running.executor.alive)
    assert isinstance(running.failures[0], DeviceLost)


def test_a_device_that_is_lost_during_a_load_ends_everything(gpu: FakeMachine) -> None:
    def prepare(_backend: str, _on_status: OnStatus, _stopped: Stopped) -> Manifest:
        gpu.cuda.lose("cudaErrorIllegalAddress")
        return Manifest.read(gpu.bundle)

    with gpu.running(others=[second(gpu, at_start=False, prepare=prepare)]) as running:
        running.models.load("other")
        gpu.wait(lambda: not running.executor.alive)
    assert isinstance(running.failures[0], DeviceLost)
