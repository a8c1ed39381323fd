"""Requests' own LoRAs, over real graphs: as diffusers draws with them fused, alone, and in a crowd of other ones."""

from __future__ import annotations

import io
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from engines.accuracy import psnr
from engines.backends.cuda import CudaStream
from engines.backends.device import Buffer
from engines.backends.onnxruntime import OnnxRuntimeDevice
from engines.contract import Array
from engines.errors import EngineError
from engines.lora.pack import pack_lora
from engines.manifest import Manifest
from server.requests.params import Lora
from tests.engines.backends.fake_cuda import FakeCuda
from tests.engines.backends.fake_tensorrt import fake_device
from tests.support.executing import Asked, Running
from tests.support.lora_crowd import WrittenLora, fused, write_loras
from tests.support.lora_requests import Chosen, LoraCaller, random_lora
from tests.support.machines import FakeMachine, Machine
from tests.support.references import draw, load_pipeline

LONG = "a red cat " * 60
SMALL: dict[str, Any] = {"width": 32, "height": 32}


def picture() -> bytes:
    image = io.BytesIO()
    PIL.Image.radial_gradient("L").resize((32, 32)).convert("RGB").save(image, "png")
    return image.getvalue()


# What a step can be made of: with LoRAs and without, long prompts, guidance that ends, the step cache, an init image.
WISHES: list[tuple[Chosen, dict[str, Any]]] = [
    ([("a", 1.0)], {"seed": 1, "num_inference_steps": 6, "scheduler": "ddim"}),
    ([], {"seed": 2, "num_inference_steps": 7, "scheduler": "euler_ancestral", "guidance_scale": 3}),
    ([("b", 0.7)], {"seed": 3, "num_inference_steps": 4, "guidance_scale": 1, "num_images": 2}),
    ([("a", 0.8), ("c", -0.6)], {"seed": 4, "num_inference_steps": 8, "cache": "fast"}),
    ([], {"seed": 5, "num_inference_steps": 6, "cache": "fast"}),
    ([("unet", 1.1)], {"seed": 6, "num_inference_steps": 5, "prompt": LONG}),
    ([("c", 1.0)], {"seed": 7, "num_inference_steps": 6, "guidance_end": 0.5}),
    ([("text", 1.0)], {"seed": 8, "num_inference_steps": 6, "width": 48, "scheduler": "heun"}),
    ([("b", 1.0)], {"seed": 10, "num_inference_steps": 6, "image": picture(), "strength": 0.6}),
    ([("a", 0.5)], {"seed": 9, "num_inference_steps": 5, "exact": True}),
]


def made_loras(bundle: Path) -> dict[str, Lora]:
    manifest = Manifest.read(bundle)
    made = [random_lora(manifest, name, ranks) for name, ranks in (("a", 2), ("b", 8), ("c", 5))]
    made += [random_lora(manifest, "unet", 4, text=False), random_lora(manifest, "text", 3, unet=False)]
    made += [random_lora(manifest, f"n{number}", 5 + number % 4) for number in range(12)]
    return {one.name: one for one in made}


@pytest.fixture(scope="module")
def cpu_caller(lora_bundle: Path) -> Iterator[LoraCaller]:
    with Machine(lora_bundle, "onnxruntime", lambda: OnnxRuntimeDevice(threads=1)).running() as running:
        yield LoraCaller(running, made_loras(lora_bundle))


@pytest.fixture(scope="module")
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture(scope="module")
def gpu_caller(fake_lora_bundle: Path, cuda: FakeCuda) -> Iterator[LoraCaller]:
    with FakeMachine(fake_lora_bundle, "tensorrt", lambda: fake_device(cuda), cuda).running() as running:
        yield LoraCaller(running, made_loras(fake_lora_bundle))
    assert not cuda.faults


@pytest.fixture(params=["cpu", "fake"])
def caller(request: pytest.FixtureRequest) -> LoraCaller:
    made: LoraCaller = request.getfixturevalue("cpu_caller" if request.param == "cpu" else "gpu_caller")
    return made


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in {"cpu_caller", "gpu_caller"} & set(request.fixturenames):
        running: Running = request.getfixturevalue(name).running
        loras = running.pipeline._loras
        assert loras
        assert (loras.used, loras._uploads) == (0, {})
        assert not running.pipeline._prompts._cache._users
        assert not running.executor._requests.owned


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return load_pipeline(checkpoint)


@pytest.fixture(scope="module")
def written(lora_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, WrittenLora]]:
    folder = tmp_path_factory.mktemp("loras")
    return folder, {lora.name: lora for lora in write_loras(folder, Manifest.read(lora_bundle))}


@pytest.mark.parametrize("chosen", [[("kohya", 1.0)], [("kohya", 0.8), ("diffusers-unet", -0.6)], [("early", 1.0)]])
def test_the_picture_is_diffusers_own_with_the_loras_fused(
    cpu_caller: LoraCaller, reference: Any, written: tuple[Path, dict[str, WrittenLora]], chosen: Chosen
) -> None:
    """UNet and text encoder, two at once. Measured: at least 69 dB, 21 dB without them."""
    folder, loras = written
    made = {name: packed(folder / f"{name}.safetensors", cpu_caller.running.manifest) for name, _ in chosen}
    fields: dict[str, Any] = {"prompt": "a red cat", "num_inference_steps": 8, "guidance_scale": 7.5, **SMALL}
    (ours,) = LoraCaller(cpu_caller.running, made).draw(chosen, seed=4, scheduler="ddim", **fields)
    with fused(reference, [(loras[name], weight) for name, weight in chosen]):
        theirs = draw(reference, scheduler="ddim", seed=4, **fields)
    assert psnr(ours, theirs) >= 45
    (plain,) = cpu_caller.draw(seed=4, scheduler="ddim", **fields)
    assert psnr(plain, theirs) < 30, "the LoRAs hardly matter: this proves nothing"


def packed(path: Path, manifest: Manifest) -> Lora:
    made = pack_lora(path, manifest)
    return Lora(path.stem, made.sha256, made.values, "unet" in made.parts, "text_encoder" in made.parts)


def test_everyone_gets_the_picture_they_would_get_alone(caller: LoraCaller) -> None:
    """Measured: the same bits on a CPU."""
    alone = [caller.draw(chosen, **fields) for chosen, fields in WISHES]
    before = caller.running.device.launches.copy()
    together = [asked.images() for asked in caller.ask_together(WISHES)]
    launched = caller.running.device.launches - before
    for solo, crowd in zip(alone, together, strict=True):
        assert min(psnr(one, other) for one, other in zip(solo, crowd, strict=True)) >= 50
    assert launched["denoise_lora"]
    assert launched["denoise_shallow_lora"]
    np.testing.assert_array_equal(together[-1], alone[-1], err_msg="exact")


def test_loras_take_no_more_unet_calls(caller: LoraCaller) -> None:
    """Requests that share steps without LoRAs share them with different ones, and with none."""
    fields = [{"seed": seed, "num_inference_steps": 20 + seed, "guidance_scale": 1, **SMALL} for seed in range(4)]
    calls = []
    with_loras: list[Chosen] = [[("a", 1.0)], [("b", 1.0)], [], [("a", 0.5), ("c", 1.0)]]
    for chosen in (with_loras, [()] * 4, with_loras):  # uploaded at first, which may delay first steps
        before = caller.running.device.launches.copy()
        for asked in caller.ask_together(list(zip(chosen, fields, strict=True))):
            asked.images()
        launched = caller.running.device.launches - before
        calls.append(sum(launched[graph] for graph in ("denoise", "denoise_lora")))
    assert calls[2] <= calls[1] + 2, "encoding may delay first steps, and no others"


def test_a_step_without_loras_is_the_plain_graphs(cpu_caller: LoraCaller, bundle: Path) -> None:
    fields: dict[str, Any] = {"seed": 3, "num_inference_steps": 5, "cache": "fast", "num_images": 2}
    cpu_caller.draw([("a", 1.0)], seed=4)
    before = cpu_caller.running.device.launches.copy()
    images = cpu_caller.draw(**fields)
    launched = cpu_caller.running.device.launches - before
    assert not any(launched[graph] for graph in ("denoise_lora", "denoise_shallow_lora", "encode_prompt_lora"))
    with Machine(bundle, "onnxruntime", lambda: OnnxRuntimeDevice(threads=1)).running() as running:
        np.testing.assert_array_equal(running.ask(**fields).images(), images)


def test_prompts_are_encoded_with_those_loras_that_update_the_text_encoder(caller: LoraCaller) -> None:
    def encoded(chosen: Chosen) -> tuple[int, int]:
        before = caller.running.device.launches.copy()
        caller.draw(chosen, prompt="two old boats", negative_prompt="rain", num_inference_steps=1, **SMALL)
        launched = caller.running.device.launches - before
        return launched["encode_prompt"], launched["encode_prompt_lora"]

    assert encoded([]) == (2, 0)
    assert encoded([("unet", 1.0)]) == (0, 0), "the same embeddings as without it"
    assert encoded([("unet", 1.0), ("text", 0.5)]) == (0, 2)
    assert encoded([("text", 0.5)]) == (0, 0), "the same embeddings as with it"
    assert encoded([("text", 0.6)]) == (0, 2)


def test_more_loras_than_the_pool_holds_take_turns_in_it(caller: LoraCaller) -> None:
    names = [name for name in caller.loras if name.startswith("n")]
    assert sum(caller.loras[name].ranks for name in names) > 2 * caller.running.manifest.lora.ranks  # type: ignore[union-attr]
    wishes: list[tuple[Chosen, dict[str, Any]]] = [
        ([(name, 0.8)], {"seed": seed, "num_inference_steps": 2 + seed % 4, "width": (32, 48)[seed % 2], "height": 32})
        for seed, name in enumerate(names)
    ]
    alone = [caller.draw(chosen, **fields) for chosen, fields in wishes]
    together = [asked.images() for asked in caller.ask_together(wishes)]
    plain = [caller.draw(**fields) for _chosen, fields in wishes]
    for (solo,), (crowd,), (without,) in zip(alone, together, plain, strict=True):
        assert psnr(solo, crowd) >= 50
        assert psnr(solo, without) < 35


class Uploads:
    """Counts what is written to the LoRA pool, of which one write may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, caller: LoraCaller) -> None:
        self.writes = 0
        self.fails_at = 0
        stream, pool = type(caller.running.pipeline._streams.encode), caller.running.pipeline._loras
        assert pool
        real = stream.write

        def write(stream: Any, buffer: Buffer, values: Array, *, at: int | None = None) -> None:
            if buffer is pool.buffer:
                self.writes += 1
                if self.writes == self.fails_at:
                    raise EngineError("a bad cable")
            real(stream, buffer, values, at=at)

        monkeypatch.setattr(stream, "write", write)
        monkeypatch.setattr(pool, "_ranks_per_call", 1)


def test_a_failed_part_of_an_upload_ends_that_request_alone(
    caller: LoraCaller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one that waits for the same LoRA goes on with it."""
    fields = {"num_inference_steps": 3, **SMALL}
    expected = caller.draw([("b", 1.0)], seed=2, **fields)
    forget(caller, "b")
    uploads = Uploads(monkeypatch, caller)
    uploads.fails_at = 3
    wishes: list[tuple[Chosen, dict[str, Any]]] = [
        ([("b", 1.0)], {"seed": 1, **fields}),
        ([("b", 1.0)], {"seed": 2, **fields}),
        ([], {"seed": 3, **fields}),
    ]
    first, second, base = caller.ask_together(wishes)
    assert [one.outcome_name() for one in (first, second, base)] == ["StepFailed", "Completed", "Completed"]
    assert uploads.writes == 8 + 1
    assert psnr(second.images()[0], expected[0]) >= 50


def test_a_lora_that_several_wait_for_is_uploaded_once(caller: LoraCaller, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"num_inference_steps": 2, **SMALL}
    forget(caller, "b")
    uploads = Uploads(monkeypatch, caller)
    for asked in caller.ask_together([([("b", 1.0)], {"seed": seed, **fields}) for seed in range(3)]):
        asked.images()
    assert uploads.writes == caller.loras["b"].ranks


def test_others_take_steps_while_a_lora_is_uploaded(
    gpu_caller: LoraCaller, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part follows when the last has arrived, which it does not while the stream is held."""
    forget(gpu_caller, "b")
    uploads = Uploads(monkeypatch, gpu_caller)
    base = gpu_caller.ask(seed=2, num_inference_steps=20, **SMALL)
    base.wait(lambda: base.steps)
    with held(gpu_caller, cuda):
        waits = gpu_caller.ask([("b", 1.0)], seed=1, num_inference_steps=2, **SMALL)
        assert base.outcome_name() == "Completed"
        assert uploads.writes <= 1
        assert not waits.endings
    assert waits.outcome_name() == "Completed"
    assert uploads.writes == gpu_caller.loras["b"].ranks


def test_a_request_that_is_cancelled_during_its_upload_gives_everything_back(
    gpu_caller: LoraCaller, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = gpu_caller.draw([("b", 1.0)], seed=1, num_inference_steps=2, **SMALL)
    forget(gpu_caller, "b")
    uploads, asked = Uploads(monkeypatch, gpu_caller), Asked()
    request = gpu_caller.request(asked, [("b", 1.0)], seed=1, num_inference_steps=2, **SMALL)
    with held(gpu_caller, cuda):
        gpu_caller.running.batcher.submit(request)
        gpu_caller.running.wait(lambda: uploads.writes)
        request.cancel()
        gpu_caller.running.batcher.wake()
    assert asked.outcome_name() == "Cancelled"
    (image,) = gpu_caller.draw([("b", 1.0)], seed=1, num_inference_steps=2, **SMALL)
    assert psnr(image, expected) >= 50, "half of it was taken for all of it"


def lookups(running: Running) -> tuple[float, float]:
    """LoRAs that the device held, and that it had to load."""
    text = running.metrics.render().decode()
    found = dict(re.findall(r'latentd_lora_lookups_total\{.*result="(\w+)"\} ([\d.]+)', text))
    return float(found["hit"]), float(found["miss"])


def test_lookups_are_counted_by_whether_the_device_held_the_lora(caller: LoraCaller) -> None:
    forget(caller, "b")
    hits, misses = lookups(caller.running)
    for seed in range(3):
        caller.draw([("b", 1.0)], seed=seed, num_inference_steps=2, **SMALL)
    caller.draw(seed=1, num_inference_steps=2, **SMALL)
    assert lookups(caller.running) == (hits + 2, misses + 1)


def ranks_while_running(caller: LoraCaller, chosen: Chosen, seed: int) -> float:
    """The ranks in use after the first step of a request, which is then cancelled."""
    running, asked = caller.running, Asked()
    request = caller.request(asked, chosen, seed=seed, num_inference_steps=200, **SMALL)
    running.batcher.submit(request)
    asked.wait(lambda: asked.steps)
    used = running.metric("latentd_lora_ranks_used")
    request.cancel()
    running.batcher.wake()
    assert asked.outcome_name() == "Cancelled"
    return used


def test_who_is_cancelled_while_running_gives_ranks_back(caller: LoraCaller) -> None:
    """More requests than the pool has room for at once."""
    running, ranks = caller.running, caller.loras["b"].ranks + caller.loras["c"].ranks
    assert running.manifest.lora
    for seed in range(running.manifest.lora.ranks // ranks + 1):
        assert ranks_while_running(caller, [("b", 1.0), ("c", 0.5)], seed) == ranks
        running.wait(lambda: running.metric("latentd_lora_ranks_used") == 0)


@pytest.mark.parametrize("is_known", [True, False])
def test_ranks_are_overwritten_after_the_last_step_that_reads_them(
    gpu_caller: LoraCaller, cuda: FakeCuda, *, is_known: bool
) -> None:
    pool, streams = gpu_caller.running.pipeline._loras, gpu_caller.running.pipeline._streams
    assert pool
    first, second = (random_lora(gpu_caller.running.manifest, name, 1) for name in ("x", "y"))
    free, pool._cache._free = pool._cache._free[1:], pool._cache._free[:1]
    cached, pool._cache._rows = pool._cache._rows, OrderedDict()
    (row,) = pool.acquire(first)
    assert pool.upload([first])
    streams.encode.record().wait()
    reading = streams.steps.read(pool.buffer, at=row)  # as a step does
    pool.release(first, streams.steps.record() if is_known else None)
    assert pool.acquire(second) == (row,)
    assert pool.upload([second])
    reading.result()
    streams.encode.record().wait()
    pool.release(second)
    assert any("no event orders them" in fault for fault in cuda.faults) != is_known
    cuda.faults.clear()
    pool._cache._free += free
    pool._cache._rows |= cached


def held(caller: LoraCaller, cuda: FakeCuda) -> AbstractContextManager[None]:
    """Hold the stream that uploads and encodes."""
    encode = caller.running.pipeline._streams.encode
    assert isinstance(encode, CudaStream)
    return cuda.gate(encode.handle)


def forget(caller: LoraCaller, name: str) -> None:
    """Let a LoRA make room for others, so that it has to be uploaded."""
    for number in range(8):
        caller.draw([(f"n{number}", 1.0)], seed=1, num_inference_steps=1, **SMALL)
    assert caller.running.pipeline._loras
    assert caller.loras[name].sha256 not in caller.running.pipeline._loras._cache
