"""webuiapi, a Python client of AUTOMATIC1111's web UI."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest
import webuiapi
from numpy.typing import NDArray

from tests.clients.load import FullQueue, is_idle
from tests.support.bare_server import wait_until
from tests.support.meeting import HeldServing
from tests.support.serving import Serving

SIZE = 64
QUICK: dict[str, Any] = {"prompt": "a red heart", "width": SIZE, "height": SIZE, "steps": 4, "seed": 7}
SLOW: dict[str, Any] = QUICK | {"steps": 200, "batch_size": 8, "sampler_name": "DPM++ 2M"}
SAME = {"prompt": "a red heart", "guidance_scale": 7.0, "num_inference_steps": 4, "seed": 7}  # as QUICK, natively
HELD_AT = 25  # of the steps of a call in the background: it is half done, and has shown previews


class Background:
    """A call of txt2img in a thread, on a connection of its own, which stops at a step until it is asked for."""

    def __init__(self, serving: HeldServing, pool: ThreadPoolExecutor, hold: ExitStack) -> None:
        self._serving, self._pool, self._hold = serving, pool, hold

    def __call__(self, *, held_at: int = HELD_AT, **fields: Any) -> Background:
        self._hold.enter_context(self._serving.held())
        self._serving.let(held_at)
        self._call = self._pool.submit(lambda: connect(self._serving).txt2img(**fields))
        return self

    def result(self) -> webuiapi.WebUIApiResult:
        self._hold.close()
        return self._call.result()


def connect(serving: Serving, **options: Any) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{serving.url}/sdapi/v1", **options)


@pytest.fixture
def api(serving: Serving) -> webuiapi.WebUIApi:
    return connect(serving)


@pytest.fixture
def background(serving: HeldServing) -> Iterator[Background]:
    with ThreadPoolExecutor(1) as threads, ExitStack() as hold:
        yield Background(serving, threads, hold)
        connect(serving).interrupt()
    wait_until(lambda: is_idle(serving))


def pixels(image: PIL.Image.Image) -> NDArray[np.int64]:
    return np.asarray(image.convert("RGB"), np.int64)


def natively(serving: Serving, **fields: Any) -> list[NDArray[np.int64]]:
    answer = serving.generate(**fields)
    assert answer.status_code == 200, answer.text
    files = [base64.b64decode(image["image"]) for image in answer.json()["images"]]
    return [pixels(PIL.Image.open(io.BytesIO(file))) for file in files]


def encode(image: PIL.Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def same(ours: list[PIL.Image.Image], others: list[NDArray[np.int64]]) -> bool:
    assert len(ours) == len(others)
    return all((pixels(image) == other).all() for image, other in zip(ours, others, strict=True))


def refusal(call: Callable[[], object]) -> tuple[int, str]:
    with pytest.raises(RuntimeError) as refused:
        call()
    status, text = refused.value.args
    return status, text


def running(api: webuiapi.WebUIApi, job_no: int = 0) -> dict[str, Any]:
    """The progress once the call is at `job_no`, and has shown a preview of it."""
    found: dict[str, Any] = {}

    def is_there() -> bool:
        found.update(api.get_progress())
        return bool(found["state"]["job_no"] == job_no and found["current_image"])

    wait_until(is_there)
    return found


def test_pictures_are_those_of_the_servers_own_api(api: webuiapi.WebUIApi, serving: Serving) -> None:
    result = api.txt2img(**QUICK, cfg_scale=5.0, negative_prompt="blue", batch_size=2, n_iter=2)
    ours = SAME | {"negative_prompt": "blue", "guidance_scale": 5.0, "num_images": 4}
    assert same(result.images, natively(serving, **ours, scheduler="Euler a"))
    assert result.info["all_seeds"] == [7, 8, 9, 10]
    assert result.info["all_prompts"] == ["a red heart"] * 4
    assert [text.partition("Seed: ")[2].partition(",")[0] for text in result.info["infotexts"]] == ["7", "8", "9", "10"]
    assert result.info["sampler_name"] == "Euler a"
    assert result.info["warnings"] == []
    assert result.parameters["steps"] == 4


def test_info_has_what_strict_clients_read(api: webuiapi.WebUIApi) -> None:
    info = api.txt2img(**QUICK).info
    texts = ("prompt", "negative_prompt", "sampler_name", "sd_model_name", "sd_model_hash", "job_timestamp", "version")
    numbers = ("seed", "subseed", "subseed_strength", "width", "height", "cfg_scale", "batch_size", "clip_skip")
    more = ("seed_resize_from_w", "seed_resize_from_h", "index_of_first_image")
    lists = ("all_prompts", "all_negative_prompts", "all_seeds", "all_subseeds", "infotexts", "styles")
    assert all(isinstance(info[name], str) for name in texts)
    assert all(isinstance(info[name], int | float) for name in (*numbers, *more))
    assert all(isinstance(info[name], list) for name in lists)
    assert {"sd_vae_name", "sd_vae_hash", "denoising_strength"} <= info.keys()
    assert (info["restore_faces"], info["is_using_inpainting_conditioning"]) == (False, False)
    assert info["extra_generation_params"] == {}


@pytest.mark.parametrize(
    ("fields", "scheduler"),
    [
        ({}, "Euler a"),
        ({"sampler_name": "DPM++ 2M"}, "dpmpp_2m"),
        ({"sampler_name": "DPM++ 2M Karras"}, "dpmpp_2m_karras"),
        ({"sampler_name": "DPM++ 2M", "scheduler": "Karras"}, "dpmpp_2m_karras"),
        ({"sampler_name": "Euler", "scheduler": "beta"}, "euler_beta"),
        ({"sampler_name": "Automatic"}, None),
    ],
)
def test_samplers_by_their_names_in_the_web_ui(
    api: webuiapi.WebUIApi, serving: Serving, fields: dict[str, Any], scheduler: str | None
) -> None:
    assert same(api.txt2img(**QUICK, **fields).images, natively(serving, **SAME, scheduler=scheduler))


def test_the_defaults_of_the_client(serving: Serving) -> None:
    api = connect(serving, sampler="DPM++ 2M", scheduler="Karras", steps=3)
    result = api.txt2img(prompt="a cat", width=SIZE, height=SIZE)
    assert "Steps: 3, Sampler: DPM++ 2M, Schedule type: Karras" in result.info["infotexts"][0]
    again = api.txt2img(prompt="a cat", width=SIZE, height=SIZE, seed=result.info["seed"])
    assert same(result.images, [pixels(again.image)])


def test_a_batch_of_more_rows_than_a_step_takes_several(api: webuiapi.WebUIApi, serving: Serving) -> None:
    result = api.txt2img(**QUICK, batch_size=10)
    assert result.info["all_seeds"] == [*range(7, 17)]
    assert same(result.images[9:], natively(serving, **SAME | {"seed": 16}, scheduler="Euler a"))


def test_clip_skip(api: webuiapi.WebUIApi, serving: Serving) -> None:
    result = api.txt2img(**QUICK, override_settings={"CLIP_stop_at_last_layers": 2, "sd_vae": "Automatic"})
    assert same(result.images, natively(serving, **SAME, scheduler="Euler a", clip_skip=1))
    assert result.info["clip_skip"] == 2


def picture() -> PIL.Image.Image:
    ramp = np.linspace(0, 255, SIZE, dtype=np.uint8)
    return PIL.Image.fromarray(np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(90)), axis=-1))


def square() -> PIL.Image.Image:
    """A mask that repaints the middle."""
    mask = PIL.Image.new("L", (SIZE, SIZE))
    mask.paste(255, (24, 24, 40, 40))
    return mask


def test_image_to_image(api: webuiapi.WebUIApi, serving: Serving) -> None:
    result = api.img2img(images=[picture()], denoising_strength=0.5, **QUICK)
    fields = SAME | {"strength": 0.5, "image": encode(picture())}
    assert same(result.images, natively(serving, **fields, scheduler="Euler a"))
    assert result.info["denoising_strength"] == 0.5
    assert "init_images" not in result.parameters
    repeated = api.img2img(images=[picture()], include_init_images=True, **QUICK).parameters["init_images"]
    assert repeated == [encode(picture())]


@pytest.mark.parametrize(("resize_mode", "corner"), [(0, "red"), (1, "lime"), (2, "red")])
def test_resize_modes(api: webuiapi.WebUIApi, resize_mode: int, corner: str) -> None:
    """Of an image that is red, green in the middle, and red, twice as wide as high: hardly changed by one step."""
    wide = PIL.Image.new("RGB", (2 * SIZE, SIZE), "red")
    wide.paste("lime", (SIZE // 2, 0, SIZE * 3 // 2, SIZE))
    fields = QUICK | {"steps": 20, "denoising_strength": 0.05, "sampler_name": "DDIM", "eta": 0.0}
    made = pixels(api.img2img(images=[wide], resize_mode=resize_mode, **fields).image)
    red, green = made[4:-4, 4:8, 0].mean(), made[4:-4, 4:8, 1].mean()
    assert (green > red) == (corner == "lime")


@pytest.mark.parametrize("inpaint_full_res", [True, False])
def test_a_mask_repaints_its_white_area_alone(api: webuiapi.WebUIApi, inpaint_full_res: bool) -> None:
    masked = {"images": [picture()], "mask_image": square(), "inpaint_full_res": inpaint_full_res}
    result = api.img2img(**masked, **QUICK)
    changed = np.abs(pixels(result.image) - pixels(picture())).max(axis=-1)
    assert changed[28:36, 28:36].mean() > 20
    assert not changed[:8].any()
    assert not changed[:, -8:].any()
    inverted = api.img2img(**masked, inpainting_mask_invert=1, mask_blur=0, **QUICK)
    changed = np.abs(pixels(inverted.image) - pixels(picture())).max(axis=-1)
    assert not changed[24:40, 24:40].any()
    assert changed[:16].mean() > 5


def test_the_fill_decides_what_the_masked_area_begins_with(api: webuiapi.WebUIApi) -> None:
    image = PIL.Image.new("RGB", (SIZE, SIZE), "yellow")
    image.paste("blue", (24, 24, 40, 40))
    fields = QUICK | {"steps": 20, "denoising_strength": 0.05, "sampler_name": "DDIM", "eta": 0.0}
    masked = {"images": [image], "mask_image": square().filter(PIL.ImageFilter.MaxFilter(5)), "inpaint_full_res": False}
    around, original = (pixels(api.img2img(inpainting_fill=fill, **masked, **fields).image) for fill in (0, 1))
    assert around[28:36, 28:36, 2].mean() < 128 < original[28:36, 28:36, 2].mean()


def test_the_masked_area_alone_keeps_the_size_that_was_sent(api: webuiapi.WebUIApi) -> None:
    large, mask = picture().resize((200, 120)), square().resize((200, 120))
    result = api.img2img(images=[large], mask_image=mask, inpaint_full_res_padding=8, **QUICK)
    assert result.image.size == (200, 120)
    assert not np.abs(pixels(result.image) - pixels(large))[:20].any()


def test_progress_with_a_preview_then_interrupt(api: webuiapi.WebUIApi, background: Background) -> None:
    idle = api.get_progress()
    assert (idle["progress"], idle["state"]["job_count"]) == (0.0, 0)
    call = background(**SLOW)
    now = running(api)
    assert 0 < now["progress"] < 1
    assert now["eta_relative"] > 0
    assert (now["state"]["job_count"], now["state"]["sampling_steps"]) == (1, 200)
    preview = PIL.Image.open(io.BytesIO(base64.b64decode(now["current_image"])))
    assert preview.size == (SIZE // 4, SIZE // 4)
    assert api.custom_get("progress?skip_current_image=true", baseurl=True)["current_image"] is None
    assert api.interrupt() == {}
    status, text = refusal(call.result)
    assert status == 499
    assert "interrupted" in text
    wait_until(lambda: api.get_progress() == idle)


def test_interrupt_leaves_the_images_that_are_complete(api: webuiapi.WebUIApi, background: Background) -> None:
    call = background(held_at=50 + HELD_AT, **QUICK | {"steps": 50, "n_iter": 16})
    running(api, job_no=1)
    api.interrupt()
    result = call.result()
    assert result.info["all_seeds"] == [*range(7, 7 + len(result.images))]
    assert 1 <= len(result.images) < 16


def test_skip_goes_on_with_the_next_batch(api: webuiapi.WebUIApi, background: Background) -> None:
    call = background(**QUICK | {"steps": 50, "n_iter": 2})
    running(api)
    api.skip()
    assert call.result().info["all_seeds"] == [8]


def test_pages_of_other_origins_interrupt_nothing(
    api: webuiapi.WebUIApi, serving: Serving, background: Background
) -> None:
    call = background(**QUICK | {"steps": 50})
    running(api)
    for action in ("interrupt", "skip"):
        foreign = {"Origin": "https://elsewhere.example"}
        answer = serving.client.post(f"/sdapi/v1/{action}", headers=foreign)
        assert answer.status_code == 403
        assert answer.json().keys() == {"detail"}
    assert call.result().images


def test_the_job_has_the_id_that_was_sent(api: webuiapi.WebUIApi, serving: HeldServing) -> None:
    with ThreadPoolExecutor(1) as threads, serving.held():
        serving.let(HELD_AT)
        call = threads.submit(lambda: serving.client.post("/sdapi/v1/txt2img", json=SLOW | {"force_task_id": "one"}))
        assert running(api)["state"]["job"] == "one"
        api.interrupt()
        serving.let(2 * HELD_AT)
        assert call.result().status_code == 499
    wait_until(lambda: is_idle(serving))


def test_a_caller_who_leaves_ends_the_call(api: webuiapi.WebUIApi, serving: HeldServing) -> None:
    body = b'{"width": 64, "height": 64, "steps": 200, "batch_size": 8, "n_iter": 8}'
    head = "POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}"
    address = urlsplit(serving.url)
    with serving.held(), socket.create_connection((address.hostname, address.port)) as caller:
        serving.let(HELD_AT)
        caller.sendall(f"{head}\r\n\r\n".encode() + body)
        running(api)
    wait_until(lambda: api.get_progress()["state"]["job_count"] == 0)
    wait_until(lambda: is_idle(serving))


def test_async(serving: Serving) -> None:
    async def generate() -> webuiapi.WebUIApiResult:
        return await connect(serving).txt2img(**QUICK, use_async=True)

    assert same(asyncio.run(generate()).images, [pixels(connect(serving).txt2img(**QUICK).image)])


def test_a_time_limit_is_for_the_whole_call(serving: Serving) -> None:
    body = QUICK | {"steps": 50, "n_iter": 60}
    answer = serving.client.post("/sdapi/v1/txt2img", json=body, headers={"X-Request-Timeout": "1"})
    assert answer.status_code == 504
    assert isinstance(answer.json()["detail"], str)
    wait_until(lambda: is_idle(serving))


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [(b"{", "application/json", 400), (b"[]", "application/json", 422), (b"a=1", "text/plain", 415)],
)
@pytest.mark.parametrize("path", ["txt2img", "img2img", "options", "png-info"])
def test_bodies_that_cannot_be_read(serving: Serving, path: str, content: bytes, kind: str, status: int) -> None:
    answer = serving.client.post(f"/sdapi/v1/{path}", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert answer.json().keys() == {"detail"}


def test_unknown_paths_have_details(api: webuiapi.WebUIApi) -> None:
    status, text = refusal(lambda: api.interrogate(picture()))
    assert status == 404
    assert '{"detail":"' in text


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"enable_hr": True}, "enable_hr"),
        ({"steps": 999}, "steps"),
        ({"width": 512}, "width"),
        ({"tiling": True}, "tiling"),
        ({"styles": ["x"]}, "styles"),
        ({"s_churn": 1}, "s_churn"),
        ({"subseed_strength": 0.5}, "subseed_strength"),
        ({"sampler_name": "DPM adaptive"}, "sampler_name"),
        ({"scheduler": "Turbo"}, "scheduler"),
        ({"eta": 0.5}, "eta"),
        ({"script_name": "x/y plot"}, "script_name"),
        ({"batch_size": 60, "n_iter": 2}, "n_iter"),
        ({"override_settings": {"sd_model_checkpoint": "other"}}, "sd_model_checkpoint"),
        ({"override_settings": {"eta_noise_seed_delta": 31337}}, "eta_noise_seed_delta"),
        ({"controlnet_units": [webuiapi.ControlNetUnit()], "alwayson_scripts": {}}, "ControlNet"),
    ],
)
def test_what_would_change_the_picture_is_refused(api: webuiapi.WebUIApi, fields: dict[str, Any], named: str) -> None:
    status, text = refusal(lambda: api.txt2img(**QUICK | fields))
    assert status == 422
    assert f'"{named}"' in text


def test_what_is_switched_off_is_accepted(api: webuiapi.WebUIApi) -> None:
    off = {"ADetailer": {"args": [False]}, "ControlNet": {"args": [{"enabled": False}]}, "Sag": {"args": []}}
    result = api.txt2img(**QUICK, alwayson_scripts=off, override_settings={"grid_save": False}, save_images=True)
    assert len(result.info["warnings"]) == 2


def test_a_full_queue_is_429(full_queue: FullQueue) -> None:
    status, text = refusal(lambda: connect(full_queue.serving).txt2img(**QUICK))
    assert status == 429
    assert '{"detail":"' in text


def test_lists(api: webuiapi.WebUIApi) -> None:
    model = api.util_get_model_names()[0]
    assert api.util_get_current_model() == model
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= {*api.util_get_sampler_names()}
    assert {"automatic", "karras", "beta"} <= {*api.util_get_scheduler_names()}
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    nothing = ("loras", "upscalers", "sd_vae", "hypernetworks", "face_restorers", "prompt_styles", "realesrgan_models")
    assert [getattr(api, f"get_{name}")() for name in nothing] == [[]] * len(nothing)
    assert api.get_cmd_flags() == {"api": True}
    assert api.get_memory().keys() == {"ram", "cuda"}
    api.util_wait_for_ready()


def test_every_listed_sampler_and_scheduler_is_accepted(api: webuiapi.WebUIApi) -> None:
    pairs = [(name, "automatic") for name in api.util_get_sampler_names()]
    pairs += [("Euler", name) for name in api.util_get_scheduler_names()]
    for sampler, scheduler in pairs:
        fields = QUICK | {"steps": 2, "cfg_scale": 1.0, "sampler_name": sampler, "scheduler": scheduler}
        assert len(api.txt2img(**fields).images) == 1


def test_options_stay_what_they_are(api: webuiapi.WebUIApi) -> None:
    model = api.get_options()["sd_model_checkpoint"]
    assert api.set_options({"sd_model_checkpoint": model, "CLIP_stop_at_last_layers": 1}) is None
    api.util_set_model(model.partition(" ")[0])
    assert api.set_options({"sd_model_checkpoint": "other"})["detail"][0]["loc"] == ["body", "sd_model_checkpoint"]
    assert api.set_options({"CLIP_stop_at_last_layers": 2})["detail"][0]["loc"] == ["body", "CLIP_stop_at_last_layers"]
    assert api.refresh_checkpoints() is None


def test_png_info_reads_what_a_picture_carries(api: webuiapi.WebUIApi) -> None:
    made = api.txt2img(**QUICK, negative_prompt="a dog")
    found = api.png_info(made.image)
    assert found.info == made.info["infotexts"][0] == made.image.info["parameters"]
    parameters = found.parameters
    assert (parameters["Prompt"], parameters["Negative prompt"]) == ("a red heart", "a dog")
    assert (parameters["Seed"], parameters["Size-1"], parameters["Sampler"]) == ("7", "64", "Euler a")
    assert api.png_info(PIL.Image.new("RGB", (8, 8))).info == ""


def test_png_info_reads_jpeg_files(serving: Serving) -> None:
    fields = {"prompt": "eine Katze für alle: 猫", "num_inference_steps": 1, "image_format": "jpeg"}
    file = serving.generate(**fields).json()["images"][0]["image"]
    found = serving.client.post("/sdapi/v1/png-info", json={"image": f"data:image/jpeg;base64,{file}"}).json()
    assert found["parameters"]["Prompt"] == "eine Katze für alle: 猫"


def test_png_info_of_what_is_no_image(serving: Serving) -> None:
    for image in ("", "AAAA", "iVBORw0KGgo=", "http://127.0.0.1/image.png"):
        answer = serving.client.post("/sdapi/v1/png-info", json={"image": image})
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["body", "image"]
