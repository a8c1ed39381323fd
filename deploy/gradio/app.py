"""A Gradio app for a latentd server.

pip install -r deploy/gradio/requirements.txt
LATENTD_URL=http://127.0.0.1:8000 python deploy/gradio/app.py
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from latentd_client import Refused, Update, connect, describe, generate

URL = os.environ.get("LATENTD_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("LATENTD_API_KEY", "")
PREVIEWS = 10  # of a request


async def model() -> dict[str, Any]:
    async with connect(URL, KEY) as client:
        return await describe(client)


async def draw(
    prompt: str,
    negative_prompt: str,
    size: str,
    steps: int,
    guidance_scale: float,
    seed: int,
    num_images: int,
    progress: gr.Progress = gr.Progress(),  # noqa: B008 - how Gradio recognizes it
) -> AsyncIterator[tuple[list[str], str]]:
    """The images of the gallery and a line of text, again and again. The Stop button closes the iterator."""
    width, height = map(int, size.split("x"))
    request = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "num_inference_steps": int(steps),
        "guidance_scale": float(guidance_scale),
        "num_images": int(num_images),
        "seed": None if seed < 0 else int(seed),
        "preview_every": -(-int(steps) // PREVIEWS),
    }
    try:
        async with connect(URL, KEY) as client:
            async for update in generate(client, request):
                progress(update.done, desc=update.text)
                if update.images:
                    with tempfile.TemporaryDirectory() as folder:  # Gradio copies the files, with all that they carry
                        yield write(update, Path(folder)), text_of(update)
    except Refused as error:
        raise gr.Error(str(error), title="No image") from None


def write(update: Update, folder: Path) -> list[str]:
    names = [f"{seed}.png" for seed in update.seeds] or [f"{index}.jpg" for index in range(len(update.images))]
    for name, image in zip(names, update.images, strict=True):
        (folder / name).write_bytes(image)
    return [str(folder / name) for name in names]


def text_of(update: Update) -> str:
    return f"Seed {', '.join(map(str, update.seeds))}" if update.seeds else update.text


def build(served: dict[str, Any]) -> gr.Blocks:
    with gr.Blocks(title=served["name"], delete_cache=(3600, 3600)) as blocks:
        prompt = gr.Textbox(label="Prompt", lines=2, autofocus=True)
        with gr.Row():
            start, stop = gr.Button("Generate", variant="primary"), gr.Button("Stop")
        with gr.Accordion("Options", open=False):
            inputs = [
                gr.Textbox(label="Negative prompt"),
                gr.Dropdown(served["resolutions"], value=served["resolutions"][0], label="Size"),
                gr.Slider(1, 200, value=served["num_inference_steps"], step=1, label="Steps"),
                gr.Slider(0, 20, value=served["guidance_scale"], step=0.1, label="Guidance scale"),
                gr.Number(value=-1, precision=0, minimum=-1, maximum=2**32 - 1, label="Seed (-1: random)"),
                gr.Slider(1, max(2, min(4, served["max_rows"] // 2)), value=1, step=1, label="Images"),
            ]
        gallery = gr.Gallery(label="Images", columns=2, object_fit="contain")
        status = gr.Textbox(label="Status", interactive=False)
        gr.Examples(served["examples"], prompt)
        running = gr.on(
            [start.click, prompt.submit],
            draw,
            [prompt, *inputs],
            [gallery, status],
            concurrency_limit=None,
            api_name="generate",
        )
        stop.click(lambda: "Stopped", None, status, cancels=[running])
    return blocks


if __name__ == "__main__":
    build(asyncio.run(model())).launch()
