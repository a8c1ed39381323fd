"""The client of the Gradio app. Gradio itself needs an older Pillow than the server, so it is not installed."""

from __future__ import annotations

import ast
import asyncio
import io
import sys
import time

import PIL.Image
import pytest

from tests import ROOT
from tests.support.serving import Serving

FOLDER = ROOT / "deploy" / "gradio"
sys.path.append(str(FOLDER))
import latentd_client as client  # noqa: E402 - a module of that folder

REQUEST = {"prompt": "a red heart on a yellow background", "seed": 3, "preview_every": 5, "num_images": 2}


async def collect(serving: Serving, **changes: object) -> list[client.Update]:
    async with client.connect(serving.url) as connection:
        return [update async for update in client.generate(connection, {**REQUEST, **changes})]


def test_an_image_comes_with_progress_and_previews(serving: Serving) -> None:
    updates = asyncio.run(collect(serving))
    done = [update.done for update in updates]
    assert done == sorted(done)
    assert done[-1] == 1.0
    previews = [update for update in updates if update.images and not update.seeds]
    assert [len(update.images) for update in previews] == [2] * len(previews) != []
    last = updates[-1]
    assert last.seeds == (3, 4)
    assert [PIL.Image.open(io.BytesIO(file)).size for file in last.images] == [(64, 64)] * 2


def test_the_model_is_described(serving: Serving) -> None:
    async def describe() -> dict[str, object]:
        async with client.connect(serving.url) as connection:
            return await client.describe(connection)

    assert asyncio.run(describe()).keys() >= {
        "name", "resolutions", "num_inference_steps", "guidance_scale", "max_rows", "examples"
    }  # fmt: skip


def test_a_refusal_says_why(serving: Serving) -> None:
    with pytest.raises(client.Refused, match="num_inference_steps"):
        asyncio.run(collect(serving, num_inference_steps=1000))


@pytest.mark.usefixtures("full_queue")
def test_a_full_queue_is_a_refusal(narrow: Serving) -> None:
    with pytest.raises(client.Refused, match=r"[Qq]ueue|full|later"):
        asyncio.run(collect(narrow))


def test_no_server_is_a_refusal() -> None:
    async def describe() -> None:
        async with client.connect("http://127.0.0.1:1") as connection:
            await client.describe(connection)

    with pytest.raises(client.Refused, match="does not answer"):
        asyncio.run(describe())


def test_closing_cancels(serving: Serving) -> None:
    async def start_and_leave() -> None:
        async with client.connect(serving.url) as connection:
            updates = client.generate(connection, {**REQUEST, "num_inference_steps": 200})
            async for update in updates:
                if update.done:
                    break
            await updates.aclose()

    before = cancelled(serving)
    asyncio.run(start_and_leave())
    deadline = time.monotonic() + 30
    while cancelled(serving) == before:
        assert time.monotonic() < deadline


def test_the_key_is_sent() -> None:
    assert client.connect("http://127.0.0.1:1", "secret").headers["Authorization"] == "Bearer secret"
    assert "Authorization" not in client.connect("http://127.0.0.1:1").headers


def test_the_app_uses_what_the_client_has() -> None:
    tree = ast.parse((FOLDER / "app.py").read_text(encoding="utf-8"))
    (names,) = [
        node.names for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "latentd_client"
    ]
    assert not [name.name for name in names if not hasattr(client, name.name)]


def cancelled(serving: Serving) -> float:
    return serving.total("latentd_requests_total", outcome="cancelled")
